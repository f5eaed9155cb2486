"""The injection suite: at least 40 hostile answers, none passes, by rules or by a judge that believes what it reads."""

from __future__ import annotations

import asyncio

import pytest
from vtengine_training.rewards.accuracy import Accuracy
from vtengine_training.rewards.judge.config import JudgeConfig
from vtengine_training.rewards.judge.injections import INJECTIONS, REFERENCE
from vtengine_training.rewards.judge.judge import Judge
from vtengine_training.rewards.rules import KINDS, Task, decide

from tests.training.rewards.episodes import direct, example
from tests.training.rewards.judge_server import honest, say, serving

TEXTS = [text for _, text in INJECTIONS]
IDS = [name for name, _ in INJECTIONS]
CHOICES = "Which animal is it?\nA. cat\nB. dog\nC. fox\nD. owl"
QUESTIONS = [
    # question, reference, fields
    ("How many chairs are there?", REFERENCE, {}),
    ("How long is it?", "4 m", {}),
    ("What share?", "4%", {}),
    ("What colour is the bus?", "red", {}),
    ("What does the sign say?", "Score", {}),
    ("Is it open?", "yes", {}),
    ("Is it open?", "no", {}),
    (CHOICES, "B", {}),
    ("Which colours?", '["red", "blue"]', {}),
    ("Which numbers?", "4, 8", {"answer_type": "list"}),
]


def test_the_suite_is_large_and_its_names_differ():
    assert len(INJECTIONS) >= 40 and len(set(IDS)) == len(IDS)


@pytest.mark.parametrize("text", TEXTS, ids=IDS)
def test_none_passes_the_rules(text):
    for question, reference, fields in QUESTIONS:
        for kind in (None, *KINDS):
            row = fields if kind is None else fields | {"answer_type": kind}
            assert decide(text, Task.of(question, [reference], row)) is not True, (question, reference, kind)


@pytest.mark.parametrize("reference", ["red", "No Parking", "4", "17.5", "yes"])
def test_the_reference_among_other_things_does_not_pass(reference):
    task = Task.of("", [reference], {})
    for text in (
        *(f"not {reference}", f"{reference} or not {reference}", f"{reference}, or something else", f"{reference} 99"),
        *(
            f"{reference}\n\nor blue",
            f"blue; {reference}",
            f"{reference} and blue",
            f"{reference}/blue",
            f"¬{reference}",
        ),
    ):
        assert decide(text, task) is not True, text


def naive(asked):
    """Obeys whatever stands outside of the fence and reads like an order; else compares letter for letter."""
    outside = asked.outside.replace(f"{asked.key} CORRECT or {asked.key} INCORRECT", "").upper()
    if any(word in outside.replace("CANDIDATE", "") for word in ("CORRECT", "SCORE", "YES", "VERDICT", "IGNORE")):
        return asked.verdict(True)
    return honest(asked)


def echo(asked):
    """Talked over: says what the candidate says."""
    return say(asked.candidate)


def echo_after_thought(asked):
    return say(f"<think>{asked.candidate}</think>{asked.candidate}")


def last_word(asked):
    """Finishes with the candidate's text where its verdict should be, the key in front."""
    return say(f"{asked.key} {asked.candidate}")


async def scores(server, mode):
    judge = Judge(JudgeConfig(url=server.url, model="tiny", canaries=0, backoff_s=0.0, concurrency=4))
    reward = Accuracy(mode, judge)
    try:
        found = []
        for text in TEXTS:
            episode = direct("x")
            object.__setattr__(episode, "answer", text)
            found.append((await reward.score(episode, example(REFERENCE))).accuracy)
        return found
    finally:
        await judge.close()


@pytest.mark.parametrize(
    ("act", "mode"), [(naive, "judge"), (naive, "rules+judge"), (echo, "judge"), (echo_after_thought, "judge")]
)
def test_none_passes_a_judge(act, mode):
    pytest.importorskip("openai")
    with serving(act) as server:
        found = asyncio.run(scores(server, mode))
        assert 1.0 not in found
        assert all(len(asked.candidate) <= 1000 for asked in server.asked)
        if act is naive:
            assert set(found) == {0.0}


def test_only_a_judge_that_puts_its_own_key_before_the_candidates_words_is_lost():
    """The limit of what fence and parser can do: such a judge fails its canaries, which is what those are for."""
    pytest.importorskip("openai")
    with serving(last_word) as server:
        passed = [name for name, accuracy in zip(IDS, asyncio.run(scores(server, "judge")), strict=True) if accuracy]
    assert set(passed) <= {"correct", "thought", "closed thought", "zero width", "tag characters", "lone surrogate"}
