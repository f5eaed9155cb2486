"""Constraints for pip: this environment's torch, and what a wheel of SGLang pins beside torch. pins.py WHEEL"""

import sys
from email.parser import BytesParser
from importlib.metadata import version
from zipfile import ZipFile

with ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    requirements = BytesParser().parsebytes(wheel.read(name)).get_all("Requires-Dist")
print(f"torch=={version('torch')}")
for requirement in requirements:
    if "==" in requirement and not requirement.startswith("torch") and not set("[;") & set(requirement):
        print(requirement)
