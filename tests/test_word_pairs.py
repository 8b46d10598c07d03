"""A second reading of the data that was written for the recipes: word pairs and worked demonstrations.

The lists of irregular words below were written apart from the files. What is not in a list must follow the rule, so a
slip in either shows.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from hfkd.eval.answers import EXTRACTORS, match

RECIPES = Path(__file__).parent.parent / "recipes"
SECOKD = RECIPES / "secokd"
PAIRS = {"past_tense": 130, "plural": 130, "ordinal": 120}
DEMONSTRATIONS = {
    "gsm8k": "gsm8k",
    "svamp": "gsm8k",
    "aqua_rat": "choice",
    "arc": "choice",
    "csqa": "choice",
    "coin_flip": "yes_no",
}

IRREGULAR_PAST = dict(
    pair.split()
    for pair in """
    arise arose/become became/begin began/bend bent/bite bit/blow blew/break broke/bring brought/build built
    buy bought/catch caught/choose chose/come came/cut cut/dig dug/do did/draw drew/drink drank/drive drove/eat ate
    fall fell/feed fed/feel felt/fight fought/find found/forget forgot/forgive forgave/freeze froze/give gave
    go went/grow grew/have had/hear heard/hide hid/hit hit/hold held/keep kept/know knew/lead led/leave left
    lend lent/lose lost/make made/mean meant/meet met/overcome overcame/put put/ride rode/rise rose/run ran
    say said/see saw/seek sought/sell sold/send sent/shake shook/shoot shot/shut shut/sit sat/sleep slept
    speak spoke/spend spent/spin spun/spread spread/stand stood/steal stole/stick stuck/swear swore/sweep swept
    swim swam/swing swung/take took/teach taught/tell told/think thought/throw threw/understand understood
    wear wore/win won/write wrote
    """.replace("\n", "/").split("/")
    if pair.strip()
)
DOUBLED = {"beg", "drop", "grab", "hug", "jog", "nod", "plan", "rob", "rub", "shop", "stop"}
TWO_PAST_FORMS = set(
    """
    abide awake bet bid bless broadcast burn burst bust cancel clap cleave clothe cost creep dive dream dwell fit fly
    focus forbid forecast get gild hang heave hew input kneel knit label lay lean leap learn lie light mow pay plead
    prove quit ring saw sew shave shear shed shine shrink sing sink slay smell sneak sow speed spell spill spit spoil
    spring stave stink strew strive swell tear thrive travel tread wake weave wed wet wind work worship
    """.split()
)
IRREGULAR_PLURAL = dict(
    pair.split()
    for pair in """
    man men/woman women/child children/foot feet/tooth teeth/goose geese/sheep sheep/aircraft aircraft
    species species/series series/leaf leaves/midwife midwives/knife knives/wife wives/shelf shelves/thief thieves
    loaf loaves/half halves/life lives/elf elves/bookshelf bookshelves/housewife housewives/policeman policemen
    fireman firemen/snowman snowmen/gentleman gentlemen/postman postmen/saleswoman saleswomen
    grandchild grandchildren/crisis crises/analysis analyses/oasis oases/thesis theses/diagnosis diagnoses
    hypothesis hypotheses/basis bases/stimulus stimuli/bacterium bacteria/potato potatoes/tomato tomatoes
    """.replace("\n", "/").split("/")
    if pair.strip()
)
TWO_PLURALS = set(
    """
    antenna appendix banjo buffalo bus cactus calf cargo criterion curriculum deer die dwarf echo fish flamingo focus
    formula fox fungus gas halo handkerchief hoof index kangaroo mango matrix memorandum mosquito motto mouse octopus
    ox penny person phenomenon rabbit roof salmon scarf stadium syllabus tornado vertex volcano wharf wolf zero
    """.split()
)
SUM = re.compile(r"((?:\d+(?:\.\d+)? [-+*/] )+\d+(?:\.\d+)?) = (\d+(?:\.\d+)?)")
ONES = "one two three four five six seven eight nine".split()
ORDINAL_ONES = "first second third fourth fifth sixth seventh eighth ninth".split()


def read_pairs(name: str) -> list[tuple[str, str]]:
    """The pairs of one file, refusing lines with other keys."""
    rows = [json.loads(line) for line in (SECOKD / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(set(row) == {"prompt", "completion"} for row in rows)
    return [(row["prompt"], row["completion"]) for row in rows]


def regular_past(verb: str) -> str:
    """The past tense by rule, given which verbs double their last consonant."""
    if verb in DOUBLED:
        return verb + verb[-1] + "ed"
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + "ed"


def regular_plural(noun: str) -> str:
    """The plural by rule."""
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def ordinal(words: str) -> str:
    """The ordinal of a cardinal in words: only its last word changes."""
    head, mark, last = re.fullmatch(r"(.*?)([ -]?)([a-z]+)", words).groups()
    if last in ONES:
        return head + mark + ORDINAL_ONES[ONES.index(last)]
    if last == "twelve":
        return head + mark + "twelfth"
    return head + mark + (last[:-1] + "ieth" if last.endswith("ty") else last + "th")


@pytest.mark.parametrize(("name", "least"), PAIRS.items())
def test_pairs_are_plain_words_and_no_prompt_comes_twice(name: str, least: int) -> None:
    """A prompt that comes twice can be a demonstration and an evaluation item at once."""
    pairs = read_pairs(name)
    prompts = [prompt for prompt, _ in pairs]
    assert len(pairs) >= least
    assert len(set(prompts)) == len(prompts)
    assert len({completion for _, completion in pairs}) == len(pairs)
    for word in (word for pair in pairs for word in pair):
        assert re.fullmatch(r"[a-z]+(?:[ -][a-z]+)*", word), word


@pytest.mark.parametrize("name", PAIRS)
def test_pair_files_have_no_empty_line(name: str) -> None:
    """A loader that splits at line ends would read an empty line as an empty row."""
    text = (SECOKD / "data" / f"{name}.jsonl").read_text(encoding="utf-8")
    assert text.endswith("}\n") and "\n\n" not in text


def test_every_past_tense_is_the_listed_one_or_follows_the_rule() -> None:
    """One wrong gold answer of 48 is two points of accuracy that no model can earn."""
    for verb, past in read_pairs("past_tense"):
        assert past == IRREGULAR_PAST.get(verb, regular_past(verb)), verb
    verbs = {verb for verb, _ in read_pairs("past_tense")}
    assert set(IRREGULAR_PAST) <= verbs and DOUBLED <= verbs
    assert 0.4 < len(IRREGULAR_PAST) / len(verbs) < 0.6


def test_short_regular_verbs_that_end_like_stop_are_listed_as_doubling() -> None:
    """The rule test cannot see 'stoped' in the data if the list of doubling verbs has the same gap."""
    for verb, _ in read_pairs("past_tense"):
        if verb not in IRREGULAR_PAST and re.fullmatch(r"[^aeiou]*[aeiou][^aeiouwxy]", verb):
            assert verb in DOUBLED, verb


def test_no_verb_has_two_accepted_past_forms() -> None:
    """'learned' marked wrong because the file says 'learnt' measures a dictionary and not a model."""
    assert not TWO_PAST_FORMS & {verb for verb, _ in read_pairs("past_tense")}


def test_every_plural_is_the_listed_one_or_follows_the_rule() -> None:
    """A wrong plural would be counted as forgetting."""
    pairs = read_pairs("plural")
    for noun, plural in pairs:
        assert plural == IRREGULAR_PLURAL.get(noun, regular_plural(noun)), noun
    assert set(IRREGULAR_PLURAL) <= {noun for noun, _ in pairs}


def test_no_noun_has_two_accepted_plurals() -> None:
    """'scarfs' and 'scarves' are both right: whichever the file holds, a right answer would be marked wrong."""
    assert not TWO_PLURALS & {noun for noun, _ in read_pairs("plural")}


def test_every_ordinal_follows_the_rule_and_one_to_one_hundred_are_there() -> None:
    """'fourtieth' or 'twelveth' are slips that a reader of 128 lines overlooks."""
    pairs = dict(read_pairs("ordinal"))
    for cardinal, written in pairs.items():
        assert written == ordinal(cardinal), cardinal
    tens = "twenty thirty forty fifty sixty seventy eighty ninety".split()
    teens = "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
    wanted = ONES + teens + tens + [f"{ten}-{one}" for ten in tens for one in ONES] + ["one hundred"]
    assert len(wanted) == 100 and set(wanted) <= set(pairs)


def demonstrations(name: str) -> list[dict[str, str]]:
    """The eight worked examples of one set."""
    return yaml.safe_load((SECOKD / "demonstrations" / f"{name}.yaml").read_text(encoding="utf-8"))


def test_there_are_demonstrations_for_each_of_the_six_sets() -> None:
    """A file that is not in the table here is read by no test."""
    assert {path.stem for path in (SECOKD / "demonstrations").glob("*.yaml")} == set(DEMONSTRATIONS)


@pytest.mark.parametrize(("name", "extract"), DEMONSTRATIONS.items())
def test_demonstrations_have_one_form_and_are_read_as_their_answer(name: str, extract: str) -> None:
    """A demonstration in a form that the scoring does not read teaches the model to be marked wrong."""
    rows = demonstrations(name)
    assert len(rows) == len({row["prompt"] for row in rows}) == 8
    for row in rows:
        assert set(row) == {"prompt", "completion", "answer"}
        assert all(isinstance(text, str) and text == text.strip() and "\n\n" not in text for text in row.values())
        assert "\n" not in row["completion"]
        stated = f"({row['answer']})" if extract == "choice" else row["answer"]
        assert row["completion"].endswith(f" The answer is {stated}.")
        assert row["completion"].count("The answer is") == 1
        assert match(EXTRACTORS[extract](row["completion"]), row["answer"])


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_the_arithmetic_of_the_demonstrations_is_right(name: str) -> None:
    """A wrong sum in a demonstration is taught eight hundred times."""
    sums = 0
    for row in demonstrations(name):
        for left, right in SUM.findall(row["completion"]):
            # The pattern lets only digits and operators through.
            assert eval(left, {"__builtins__": {}}) == pytest.approx(float(right)), f"{left} = {right}"
            sums += 1
        assert row["completion"].count("=") == len(SUM.findall(row["completion"]))
    assert sums >= (8 if name in ("gsm8k", "svamp", "aqua_rat") else 0)


@pytest.mark.parametrize(("name", "options"), [("arc", 4), ("csqa", 5), ("aqua_rat", 5)])
def test_options_of_the_demonstrations_are_lettered_and_the_answers_spread(name: str, options: int) -> None:
    """Eight demonstrations that all choose B teach to choose B."""
    rows = demonstrations(name)
    for row in rows:
        lines = row["prompt"].splitlines()[1:]
        assert [line[:4] for line in lines] == [f"({letter}) " for letter in "ABCDE"[:options]]
        assert len({line[4:] for line in lines}) == options
        assert row["answer"] in "ABCDE"[:options]
    letters = [row["answer"] for row in rows]
    assert len(set(letters)) == options and max(map(letters.count, letters)) <= 2


def test_the_right_option_of_an_algebra_demonstration_holds_the_computed_number() -> None:
    """A right sum beside the wrong letter is the slip that a check of the sums alone lets through."""
    for row in demonstrations("aqua_rat"):
        option = next(line[4:] for line in row["prompt"].splitlines() if line.startswith(f"({row['answer']}) "))
        reasoning = row["completion"].rsplit(" The answer is", 1)[0].rstrip(".")
        assert option.lstrip("$").split()[0] in re.split(r"[\s,]+", reasoning)[-4:], row["prompt"]


def test_the_coin_demonstrations_end_where_their_flips_lead() -> None:
    """A miscounted flip teaches the opposite of the task."""
    answers = []
    for row in demonstrations("coin_flip"):
        assert row["prompt"].startswith("A coin is heads up. ")
        assert row["prompt"].endswith("Is the coin still heads up?")
        side, steps = "heads", ["The coin starts as heads."]
        for name, still in re.findall(r"(\w+) (does not flip|flips) the coin\.", row["prompt"]):
            if still == "flips":
                side = "tails" if side == "heads" else "heads"
            steps.append(f"{name} {'turns it to' if still == 'flips' else 'leaves it as'} {side}.")
        assert len(steps) == 5
        expected = "yes" if side == "heads" else "no"
        assert row["completion"] == " ".join([*steps, f"It ends as {side}.", f"The answer is {expected}."])
        assert row["answer"] == expected
        answers.append(expected)
    assert answers.count("yes") == 4


def test_files_that_recipes_name_are_there() -> None:
    """A path that is wrong by a letter would show only after the model was loaded."""
    folders = ("secokd", "local", "several", "on_policy", "self_teacher")
    recipes = [path for folder in folders for path in (RECIPES / folder).glob("*.yaml")]
    assert len(recipes) >= 12
    for path in recipes:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
        sources = [recipe["data"]["train"], recipe["data"].get("demonstrations", {}), recipe["evaluation"]]
        for source in sources + recipe["evaluation"].get("forgetting", []):
            named = source.get("path") or ""
            if named.endswith((".jsonl", ".yaml")):
                assert (path.parent / named).is_file(), f"{path.name}: {named}"


def test_every_recipe_says_how_to_run_it_and_writes_to_its_own_folder() -> None:
    """Two recipes with one output folder would refuse, or overwrite, each other's run."""
    folders = []
    for path in [*(RECIPES / "secokd").glob("*.yaml"), *(RECIPES / "local").glob("*.yaml")]:
        text = path.read_text(encoding="utf-8")
        assert text.startswith("# ")
        assert f"hfkd train recipes/{path.parent.name}/{path.name}" in text
        folders.append(yaml.safe_load(text)["training"]["output_dir"])
    assert len(set(folders)) == len(folders)


def test_the_launch_configuration_is_one_that_accelerate_reads() -> None:
    """A key that accelerate does not know stops every launch."""
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(RECIPES / "accelerate" / "ddp.yaml"))
    assert config.num_processes == 2
    assert str(config.distributed_type.value) == "MULTI_GPU"
