"""The description for a package index: README.md with absolute links. All else: pyproject.toml."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
# Not parsed: Python 3.10 has no parser of TOML.
project = (HERE / "pyproject.toml").read_text()
repository = re.search(r'^Repository = "(.+)"$', project, re.MULTILINE)
assert repository is not None
readme = (HERE / "README.md").read_text()
# Images.
readme = re.sub(r"(!\[[^]]*\]\()(?!https?://)", rf"\g<1>{repository[1]}/raw/main/", readme)

setup(
    long_description=re.sub(r"\]\((?!https?://|#)", f"]({repository[1]}/blob/main/", readme),
    long_description_content_type="text/markdown",
)
