"""A small trained model and real text, so that a demo and the tests need no download.

NOTICE.md beside this file says where they come from and under which licences.
"""

from importlib import resources
from pathlib import Path


def demo_model() -> Path:
    """Return the folder of wiki-demo, a trained decoder of 3.15 M parameters in float16."""
    return _asset("wiki-demo")


def demo_text() -> Path:
    """Return the start of WikiText-2's test split, to measure on (223 KB, 9 articles)."""
    return _asset("wikitext2-test-excerpt.txt")


def demo_calibration() -> Path:
    """Return the start of WikiText-2's validation split, to calibrate on (150 KB, 10 articles)."""
    return _asset("calibration.txt")


def _asset(name: str) -> Path:
    return Path(str(resources.files(__name__))) / name
