"""Configuration: every option, typed, how the command line becomes it, and the page that lists them."""

from jaxroute.config.load import config_folder, config_yaml, load_config, read_config
from jaxroute.config.schema import Config

__all__ = ["Config", "config_folder", "config_yaml", "load_config", "read_config"]
