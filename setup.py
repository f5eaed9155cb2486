"""What pyproject.toml cannot say: the optional compiled extension."""

from setuptools import setup

setup()
