"""What contributors are told to run is what CI runs."""

import re

import yaml
from support.paths import ROOT

CHECKS = ["ruff format --check .", "ruff check .", "mypy", "lint-imports"]


def test_ci_runs_the_commands_that_contributors_are_told():
    told = (ROOT / "CONTRIBUTING.md").read_text().split("## The three commands")[1].split("```")[1]
    commands = re.split(r"\n| && ", told.removeprefix("bash").strip())
    assert commands == [*CHECKS, "pytest"]
    assert (ROOT / ".ci/run").read_text().splitlines()[-5:] == commands


def test_a_commit_is_checked_as_in_ci_but_for_the_tests():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    entries = [hook["entry"].replace("format", "format --check").split(" --force")[0] for hook in repository["hooks"]]
    assert entries == [check.removesuffix(" .") for check in CHECKS]
