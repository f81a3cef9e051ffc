"""Serving logs come in every shape of a file that the reader of tables knows."""

from shapes import check_reads_every_shape, check_refuses_every_broken_file

from jaxroute.fitting.logs import read_log

REQUESTS = [
    {
        "arrival_time": float(number),
        "first_token_time": number + 0.5,
        "last_token_time": number + 0.9,
        "prompt_tokens": 10 + number,
        "output_tokens": 3,
    }
    for number in range(40)
]


def test_every_shape_of_a_log(tmp_path):
    check_reads_every_shape(tmp_path, REQUESTS, read_log)


def test_every_broken_log(tmp_path):
    check_refuses_every_broken_file(tmp_path, REQUESTS, read_log)
