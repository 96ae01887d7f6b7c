"""The text log: how it is switched, where it goes, and its lines. Importing this is cheap: no numpy, no torch."""

from nanovllm.logging.setup import close_job_logging, configure_job_logging, parse_level

__all__ = ["close_job_logging", "configure_job_logging", "parse_level"]
