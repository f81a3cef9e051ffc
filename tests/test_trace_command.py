"""`python -m jaxroute trace`: what it prints, the workload it writes, and whether a fit finds what it should."""

from __future__ import annotations

import numpy as np
import pytest

from jaxroute.commands import trace as command_line
from jaxroute.config import load_config
from jaxroute.fitting.arrivals import fit_arrivals, gamma_dispersion, mmpp_dispersion, mmpp_variation, synthetic_times
from jaxroute.workloads import WorkloadConfig, build_workload, read_trace
from jaxroute.workloads.arrivals import RequirementConfig
from jaxroute.workloads.traces import fano_factor, gap_variation

RATE = 8.0
GAMMA = {"arrivals": "gamma", "cv": 2.5}
MMPP = {"arrivals": "mmpp", "burst_ratio": 5.0, "burst_share": 0.25, "burst_seconds": 4.0}


def run(capsys, *argv):
    """Exit code of the command line and what it printed on both streams."""
    code = command_line.main([str(argument) for argument in argv])
    out, err = capsys.readouterr()
    return code, out, err


def drawn(options, num_requests):
    config = WorkloadConfig(
        name="mine", rate=RATE, requirements=[RequirementConfig("only", share=1.0, normalised=0.05)], **options
    )
    return synthetic_times(build_workload(config, None), num_requests)


@pytest.fixture(scope="module")
def gamma_traces():
    return drawn(GAMMA, 10_000)


@pytest.fixture(scope="module")
def mmpp_traces():
    return drawn(MMPP, 40_000)


@pytest.fixture
def write(tmp_path):
    """Write a trace: a table, whose prompts have 1 to 100 tokens and outputs 10."""

    def write_file(times, name="trace.csv"):
        path = tmp_path / name
        rows = [f"{time!r},{1 + number % 100},10" for number, time in enumerate(np.asarray(times).tolist())]
        path.write_text("\n".join(["arrival_time,prompt_tokens,output_tokens", *rows]))
        return path

    return write_file


# --- formulas ---------------------------------------------------------------------------------------------------


def test_gamma_gaps_of_variation_1_are_a_poisson_process():
    windows = np.array([0.01, 1.0, 30.0, 1e4])
    np.testing.assert_allclose(gamma_dispersion(windows, 1.0), 1.0, rtol=1e-9)


@pytest.mark.parametrize("cv", [0.3, 2.5])
def test_gamma_dispersion_goes_from_1_to_the_squared_variation(cv):
    assert gamma_dispersion(np.array([1e-12]), cv)[0] == pytest.approx(1, abs=0.02)
    assert gamma_dispersion(np.array([1e7]), cv)[0] == pytest.approx(cv**2, rel=1e-5)
    # Where the sum ends and the asymptote takes over, nothing jumps.
    around = 50 * (cv**2 + 1 / cv**2) + 50 + np.array([-1e-3, 1e-3])
    low, high = gamma_dispersion(around, cv)
    assert low == pytest.approx(high, rel=1e-6)


@pytest.mark.parametrize("window", [0.25, 1.0, 10.0, 60.0])
def test_formulas_are_those_of_the_processes(gamma_traces, mmpp_traces, window):
    """The mean of 16 traces, within five standard errors."""
    shape = (MMPP["burst_ratio"], MMPP["burst_share"], MMPP["burst_seconds"] * RATE)
    for traces, expected in (
        (gamma_traces, gamma_dispersion(np.array([window * RATE]), GAMMA["cv"])[0]),
        (mmpp_traces, mmpp_dispersion(np.array([window * RATE]), *shape)[0]),
    ):
        factors = np.array([fano_factor(times, window)[0] for times in traces])
        assert abs(factors.mean() - expected) < 5 * factors.std(ddof=1) / len(factors) ** 0.5
    variations = np.array([gap_variation(times) for times in mmpp_traces])
    assert abs(variations.mean() - mmpp_variation(*shape)) < 5 * variations.std(ddof=1) / len(variations) ** 0.5


def test_a_short_trace_is_expected_to_vary_less(mmpp_traces):
    """Pieces of five windows lose the variation between pieces, and the expected factor allows for it."""
    fit = fit_arrivals(mmpp_traces[0], ["mmpp"])[0]
    window, duration, squares, means = 3.0, 15.0, 0.0, 0.0
    for times in mmpp_traces:
        for start in np.arange(0.0, 900.0, duration):
            piece = times[(times >= start) & (times < start + duration)] - start
            if len(piece):
                # Variance and mean, each added up over the pieces: their ratio is not biased, as a mean of ratios is.
                squares += fano_factor(np.append(piece, duration), window)[0] * len(piece)
                means += len(piece)
    assert fit.fano_factor(window, duration) == pytest.approx(squares / means, rel=0.1)
    assert fit.fano_factor(window, 1e6) > 1.2 * squares / means


# --- what a fit finds -------------------------------------------------------------------------------------------


def test_a_gamma_trace_is_recovered(gamma_traces):
    for times in gamma_traces[:4]:
        fit = fit_arrivals(times)[0]
        assert fit.process == "gamma"
        assert fit.options["rate"] == pytest.approx(RATE, rel=0.1)
        assert fit.options["cv"] == pytest.approx(GAMMA["cv"], rel=0.1)
        assert fit.error < 0.2


def test_an_mmpp_trace_is_recovered(mmpp_traces):
    fits = [fit_arrivals(times)[0] for times in mmpp_traces[:4]]
    assert {fit.process for fit in fits} == {"mmpp"}
    for option, tolerance in {"burst_ratio": 0.1, "burst_share": 0.2, "burst_seconds": 0.3}.items():
        found = np.array([fit.options[option] for fit in fits])
        np.testing.assert_allclose(found, MMPP[option], rtol=tolerance, err_msg=option)
    assert all(fit.options["rate"] == pytest.approx(RATE, rel=0.1) and fit.error < 0.1 for fit in fits)


def test_a_poisson_trace_is_no_bursts():
    times = np.cumsum(np.random.default_rng(0).exponential(1 / RATE, 10_000))
    fit = fit_arrivals(times - times[0])[0]
    assert fit.process == "gamma"
    assert fit.options["cv"] == pytest.approx(1, abs=0.05)


def test_the_worse_process_can_be_asked_for_and_shows(mmpp_traces):
    better = fit_arrivals(mmpp_traces[0])[0]
    (worse,) = fit_arrivals(mmpp_traces[0], ["gamma"])
    assert worse.process == "gamma"
    assert worse.error > 5 * better.error


# --- the command ------------------------------------------------------------------------------------------------


def test_describe(write, tmp_path, capsys):
    path = write(np.repeat(np.arange(0, 1500.5, 2.0), 2))
    code, out, err = run(capsys, "describe", path, "--plot", tmp_path / "new" / "trace.png")
    assert (code, err) == (0, "")
    figures = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in out.splitlines() if line.startswith("│")}
    cells = {name: [cell.strip() for cell in row] for name, row in figures.items()}
    assert cells["requests"] == ["1502"]
    assert cells["duration"] == ["1500 s"]
    assert cells["rate"] == ["1 /s"]
    assert cells["fewest and most in a minute"] == ["60, 60"]
    assert cells["CV of the gaps"] == ["1"]
    assert cells["Fano factor, 1 s"] == ["1"]  # half of the windows hold two
    assert cells["Fano factor, 60 s"] == ["0"]
    assert cells["prompt"] == ["50", "50", "95", "99"]
    assert cells["output"] == ["10", "10", "10", "10"]
    assert "50% of the requests come at the very time of the one before" in out
    assert "cache" not in out
    assert (tmp_path / "new" / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_describe_says_what_a_cache_finds(tmp_path, capsys):
    path = tmp_path / "trace.csv"
    rows = "0,160000,16,a\n1,16,0,b\n2,160017,0,a\n"  # 10,000 blocks, 1, and 10,002, of which 10,001 had been there
    path.write_text("arrival_time,prompt_tokens,output_tokens,session\n" + rows)
    code, out, err = run(capsys, "describe", path, "--plot", tmp_path / "trace.png")
    assert (code, err) == (0, "")
    cells = {line.split("│")[1].strip(): line.split("│")[-2].strip() for line in out.splitlines() if "│" in line}
    assert "prefix cache, blocks of 16 tokens" in out
    # Of a longer text the first 6,250 blocks stay, but for the one that the request between them takes.
    assert cells["100,000 tokens"] == f"{6249 / 20003:.2%}"
    assert cells["1,000,000 tokens"] == cells["without bound"] == f"{10001 / 20003:.2%}"
    assert "how long each is served plays no role" in " ".join(out.split())
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_describe_does_not_guess_from_few_windows(write, capsys):
    code, out, _ = run(capsys, "describe", write([0.0, 1.0, 30.0]))
    assert code == 0
    last = {line.split("│")[1].strip(): line.split("│")[-2].strip() for line in out.splitlines() if "│" in line}
    assert last["fewest and most in a minute"] == last["Fano factor, 10 s"] == last["Fano factor, 60 s"] == "-"
    assert last["Fano factor, 1 s"] == "0.966"  # 30 windows, two of them with one request each


def test_a_fit_is_a_workload(mmpp_traces, write, tmp_path, capsys):
    out_file = tmp_path / "workload" / "mine-1.yaml"
    path = write(mmpp_traces[0][:20_000])
    code, out, err = run(capsys, "fit", path, "--out", out_file, "--plot", tmp_path / "fit.png")
    assert (code, err) == (0, "")
    fit = fit_arrivals(mmpp_traces[0][:20_000])[0]
    config = load_config([f"hydra.searchpath=[{tmp_path}]", "workload=mine-1"]).workload
    assert (config.name, config.arrivals) == ("mine-1", "mmpp")
    for option, value in fit.options.items():
        assert getattr(config, option) == pytest.approx(value, rel=1e-4), option
    assert [requirement.name for requirement in config.requirements] == ["interactive", "standard", "relaxed"]
    assert "Taken: mmpp." in out
    assert f"train 'hydra.searchpath=[{tmp_path}]' workload=mine-1" in out
    assert (tmp_path / "fit.png").read_bytes().startswith(b"\x89PNG")
    assert [file.name for file in out_file.parent.iterdir()] == ["mine-1.yaml"]
    assert "# Prompts had 50 tokens on average, median 50, 95 % below 95." in out_file.read_text()
    # Never a second time over the first.
    before = out_file.read_text()
    assert run(capsys, "fit", path, "--out", out_file) == (
        2,
        "",
        f"error: {out_file} exists already: name another file by --out=..., or remove it\n",
    )
    assert out_file.read_text() == before


def test_a_poor_fit_says_so(mmpp_traces, write, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command_line, "_MAX_DRAWN", 1000)  # 125 s, too short for windows of a twentieth of the trace
    path = write(mmpp_traces[0][:20_000])
    code, out, _ = run(capsys, "fit", path, "--process", "gamma", "--out", tmp_path / "mine.yaml")
    assert code == 0
    assert "Poor fit: CV of the gaps" in out
    assert "Fano factor, 60 s" in out.partition("Poor fit:")[2]
    assert "once the file is in a folder named workload" in out
    assert "The synthetic traces have 1000 requests only" in out
    last = {line.split("│")[1].strip(): line.split("│")[-2].strip() for line in out.splitlines() if "│" in line}
    assert [cell for name, cell in last.items() if name.startswith("Fano")][-1] == "-"
    assert "±" in last["Fano factor, 1 s"]


def test_slow_drift_is_said_to_be_drift(write, tmp_path, capsys):
    """A single rise and fall, as in an hour of the Azure trace."""
    rng = np.random.default_rng(0)
    even = np.cumsum(rng.exponential(size=12_000))
    clock = np.linspace(0, 2000, 4000)
    passed = np.cumsum(6 + 3 * np.sin(np.pi * clock / 2000)) * (clock[1] - clock[0])
    times = np.interp(even[even < passed[-1]], passed, clock)
    code, out, _ = run(capsys, "fit", write(times), "--out", tmp_path / "mine.yaml")
    assert code == 0
    assert "Slow drift: the trace holds only" in out


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (np.zeros(300), "needs at least two requests at different times"),
        (np.arange(199.0), "the trace has 199 requests; a fit needs at least 200"),
        (np.arange(300.0), "gaps are all equal"),
    ],
)
def test_what_cannot_be_fitted(write, tmp_path, capsys, times, message):
    path = write(times)
    code, out, err = run(capsys, "fit", path, "--out", tmp_path / "new" / "mine.yaml")
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {path}: ")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "mine.txt"], "--out=mine.txt must end in .yaml"),
        (["--out", "my trace.yaml"], "--out=my trace.yaml: the file names the workload; use letters, digits, - and _"),
        (["--out", "gamma.yaml"], "there is a workload gamma already, which would be loaded"),
        (["--out", "mine.yaml", "--plot", "mine.pdf"], "--plot=mine.pdf must end in .png"),
        (["--out", "mine.yaml", "--process", "poisson"], "--process: invalid choice: 'poisson'"),
        ([], "the following arguments are required: --out; see "),
        (["--out", "trace.csv/mine.yaml"], "error: trace.csv/mine.yaml cannot be written (Not a directory): name "),
    ],
)
def test_wrong_options(gamma_traces, write, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    path = write(gamma_traces[0][:300])
    code, _, err = run(capsys, "fit", path, *options)
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_trace(tmp_path, capsys):
    code, _, err = run(capsys, "describe", tmp_path / "none.csv")
    assert code == 2
    assert err.startswith(f"error: {tmp_path / 'none.csv'} does not exist or is not a file: check the path, and give")
    assert err.count("\n") == 1


def test_the_azure_trace(data_dir):
    times = read_trace(data_dir / "azure_llm_2023" / "AzureLLMInferenceTrace_conv.csv.gz").arrival_time
    fit, other = fit_arrivals(times)
    assert (fit.process, other.process) == ("mmpp", "gamma")
    assert fit.error < 0.05
    assert other.error > 0.5
    assert fit.options["burst_seconds"] > 600
    for window in (1.0, 10.0, 60.0):
        assert fit.fano_factor(window, times[-1]) == pytest.approx(fano_factor(times, window)[0], rel=0.1)
