"""A malicious bundle that the site has approved: real SuperLink, gateway, SuperNode and executor, and what gets out."""

import re
from contextlib import ExitStack
from pathlib import Path

import pytest
from flwr.app.constants import DEFAULT_TTL

from client.gateway.approvals import decide, items
from client.gateway.cli import audit_path
from common.errors import ApprovalError, DataError, EgressError, WardroundError
from simulations.namespaces import impossible
from tests.client.gateway.ears import FOLDERS, Ears, ears
from tests.client.gateway.trial import ROUNDS, Here, Run, bundle, walled
from tests.client.gateway.trickster import LATE_SECONDS, NUMBERS, PIXELS, TEXT, low_bytes, tried
from tests.client.hospitals import wire_bytes
from tests.server.consortium.founded import NOW

DOCUMENT = Path(__file__).parents[3] / "docs" / "threat-model.md"

#: What becomes of an answer that is not of the declared form: the word in the audit log.
REFUSED = {
    "another array": "records",
    "an array beside the declared one": "arrays",
    "the name of an array": "arrays",
    "another metric": "scalars",
    "a config record": "records",
    "the payload of NaN": "not-finite",
    "metadata": "form",
    "low bits beyond the norm": "norm",
}

#: What becomes of an error: the code that arrives, without a text.
CODES = {"the text of an error": DataError.code, "an exception": 2, "a code of its own": WardroundError.code}


def unstopped() -> set[str]:
    """Return what the threat model lists as not stopped."""
    part = DOCUMENT.read_text().partition("**Not stopped, and why:**")[2].partition("\n\n**")[0]
    return {head.rstrip(".") for head in re.findall(r"^- \*\*(.+?)\*\*", part, re.MULTILINE)}


def nothing_of_it_arrives(here: Here, run: Run, trick: str) -> None:
    reply = run.ask(trick)
    assert not reply.has_content()
    assert not reply.error.reason
    assert PIXELS not in wire_bytes(reply)
    assert TEXT.encode() not in wire_bytes(reply)
    code = CODES.get(trick, EgressError.code)
    assert reply.error.code == code
    refused = [("refused", "train", REFUSED[trick])] if trick in REFUSED else []
    lines = [(line.outcome, line.kind, line.why) for line in here.events(ROUNDS[trick])]
    assert lines == [*refused, ("sent", "error", f"code-{code}")]


def what_is_not_stopped_is_said_to_be(here: Here, run: Run) -> None:
    reply = run.ask("the declared numbers")
    vector = reply.content.array_records["meta_gradient"]["meta_gradient"].numpy()
    assert low_bytes(vector)[: len(PIXELS)] == PIXELS
    assert reply.content.metric_records["scalars"]["loss"] == PIXELS[0]
    assert DEFAULT_TTL - reply.metadata.ttl >= LATE_SECONDS, "what is left of the question's time says how long"
    assert [line.outcome for line in here.events() if line.kind == "train"][-1] == "sent"
    assert {"The values of the declared numbers", "Figures", "Time", "Whether and how it fails"} <= unstopped()


def the_executor_is_behind_walls(run: Run, outside: Ears) -> None:
    if why := impossible():
        pytest.skip(f"the executor's walls were not tried: {why}")
    reply = run.ask("walls")
    bits = int(reply.content.metric_records["scalars"]["loss"])  # type: ignore[arg-type]
    # It wrote its files and sent its datagram, but nobody got them.
    assert {name for i, name in enumerate(outside.ways) if bits >> i & 1} == {"udp", *FOLDERS}
    assert outside.heard() == set()
    # Without walls the same attempts do reach the same ears.
    assert set(tried(outside.ways)) == outside.heard() == set(outside.ways)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_malicious_bundle_brings_out_nothing_but_what_is_listed(tmp_path: Path, subtests: pytest.Subtests) -> None:
    with ExitStack() as stack:
        outside = stack.enter_context(ears())
        fab, changed = bundle(outside.ways), bundle(outside.ways, b"# changed")
        here = Here(tmp_path, [fab, changed])
        stack.enter_context(here.started(stack.enter_context(walled())))
        run = stack.enter_context(here.run(fab))

        with subtests.test("it does not run before the site has approved it, whoever else has"):
            assert run.ask("the declared numbers").error.code == ApprovalError.code
            assert [line.why for line in here.events()] == ["bundle-waiting", f"code-{ApprovalError.code}"]

        for item in items(here.site):
            decide(here.site, item, "approved", NOW, NUMBERS.size)

        with subtests.test("a changed one does not run"), here.run(changed) as another:
            assert another.ask("the declared numbers").error.code == ApprovalError.code
            assert [line.why for line in here.events()][2:] == ["bundle-waiting", f"code-{ApprovalError.code}"]
            assert not [*tmp_path.glob("*/apps")], "Flower unpacks a bundle before it runs it"

        for trick in REFUSED | CODES:
            with subtests.test(trick):
                nothing_of_it_arrives(here, run, trick)

        with subtests.test("what is not stopped is said to be"):
            what_is_not_stopped_is_said_to_be(here, run)

        with subtests.test("walls"):
            the_executor_is_behind_walls(run, outside)

        with subtests.test("nothing of it is anywhere at the coordinator, nor in what the gateway wrote"):
            files = [*here.home.rglob("*"), audit_path(here.site)]
            files += [tmp_path / f"{name}.log" for name in ("coordinator", "gateway")]
            kept = b"".join(path.read_bytes() for path in files if path.is_file())
            assert b"meta_gradient" in kept
            assert PIXELS not in kept
            assert TEXT.encode() not in kept
