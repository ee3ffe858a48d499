"""`maskwork privacy plan`, from the shell's side."""

import json
from importlib.metadata import EntryPoint

import pytest
from typer.testing import CliRunner

from maskwork.cli import ENTRY_POINT_GROUP, run
from maskwork.errors import UserError
from maskwork.privacy_commands import app

COHORT = ("-n", "100", "--rounds", "40", "-d", "2000", "--min-survivors", "70", "--colluders", "10")


def said(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


def refused(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        said(*arguments)
    return str(caught.value)


def test_a_budget_is_answered_in_words() -> None:
    told = said(*COHORT, "--epsilon", "4", "--delta", "1e-5")
    lines = {line[:22].strip(): line for line in told.splitlines()}
    assert "100 participants, 40 rounds, 2,000 parameters, skellam: (4, 1e-05)-private" in told
    assert "given" in lines["epsilon"]
    assert "a guarantee" in lines["epsilon"]
    assert "follows" in lines["noise multiplier"]
    assert "60 honest survivors" in lines["noise multiplier"]
    assert "an estimate, not a guarantee" in lines["accuracy lost"]
    assert "bytes per parameter" in lines["ring"]
    assert "against the coordinator and 10 participants" in told
    assert "scikit-learn's digits" in told
    assert "weak promise" not in told


def test_noise_and_loss_can_be_what_is_given() -> None:
    assert "given" in next(x for x in said(*COHORT, "--noise-multiplier", "2").splitlines() if x.startswith("noise m"))
    told = said(*COHORT, "--accuracy-loss", "5")
    assert "given" in next(line for line in told.splitlines() if line.startswith("accuracy lost"))
    assert "A delta of 0.0063 is a weak promise" in told


def test_the_participants_that_it_takes_come_first() -> None:
    told = said(*COHORT, "--epsilon", "4", "--delta", "1e-5", "--accuracy-loss", "2")
    assert told.splitlines()[0].startswith("It takes ")
    needed = int(told.split()[2].replace(",", ""))
    assert f"{needed} participants, 40 rounds" in told


def test_central_noise_trusts_the_coordinator() -> None:
    told = said(*COHORT, "--epsilon", "4", "--mechanism", "central-gaussian")
    assert "not against the coordinator" in told
    assert "none: the coordinator adds the noise" in told


def test_json_has_what_a_script_needs() -> None:
    answer = json.loads(said(*COHORT, "--epsilon", "4", "--json"))
    assert answer["setting"]["mechanism"] == "skellam"
    assert 3.9 < answer["epsilon"] <= 4
    assert {"noise_multiplier", "accuracy_loss", "ring_bits", "bytes_per_parameter", "measured_on"} <= answer.keys()


def test_survivors_are_two_thirds_unless_said() -> None:
    answer = json.loads(said("-n", "100", "--rounds", "1", "-d", "10", "--epsilon", "4", "--json"))
    assert answer["setting"]["min_survivors"] == 67


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("--noise-multiplier", "0"), "no noise"),
        (("--epsilon", "4", "--delta", "0.02"), "at most 1/n"),
        (("--epsilon", "4", "--delta", "nan"), "at most 1/n"),
        (("--epsilon", "4", "--ring-bits", "10"), "too narrow"),
        (("--epsilon", "4", "--colluders", "69"), "Ask for at least 71"),
        (("--epsilon", "4", "--clip-norm", "nan"), "clip_norm is nan"),
        (("--epsilon", "1", "--delta", "1e-29"), "more noise than can be drawn here"),
        (("--epsilon", "4", "--noise-multiplier", "0.5"), "do not agree"),
        ((), "give one for the other two"),
    ],
)
def test_refusals_say_what_would_be_accepted(arguments: tuple[str, ...], text: str) -> None:
    assert text in refused(*COHORT, *arguments)


def test_from_the_command_line_a_refusal_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    point = EntryPoint("privacy", "maskwork.privacy_commands:app", ENTRY_POINT_GROUP)
    with pytest.raises(SystemExit) as caught:
        run({"privacy": (point,)}, ["privacy", "plan", *COHORT, "--epsilon", "4", "--delta", "1"])
    assert caught.value.code == 1
    assert capsys.readouterr().err.startswith("error: delta is 1.0: give a positive one of at most 1/n")
