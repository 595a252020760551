"""What a study will cost its patients and how much its noise will leave of the signal, before anything runs."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from common.meta import flatten
from common.privacy.accounting import epsilon, noise_for, renyi_epsilon
from common.privacy.mechanism import SENSITIVITY, signal_to_noise
from common.privacy.site_task import sums_of
from common.privacy.statement import guarantee, rounded_up, rounds_of
from common.study import Study
from server.rounds import initial_theta

__all__ = ["facts_of", "in_words"]


def facts_of(study: Study, wanted: Sequence[float], patients: int | None = None) -> dict[str, Any]:
    """Return a study's privacy in numbers, ready for JSON.

    Parameters
    ----------
    wanted : sequence of float
        Epsilons to say the noise for.
    patients : int, optional
        Training patients of a site.
    """
    plan, rounds, parts = study.privacy, study.study.rounds, study.episodes.per_round
    facts: dict[str, Any] = {
        "study": {"id": study.study.id, "digest": study.digest, "rounds": rounds},
        "mechanism": plan.mechanism,
        "guaranteed": plan.guaranteed,
        "guarantee": guarantee(study),
    }
    if plan.mechanism == "none":
        return facts
    sensitivity = SENSITIVITY[plan.mechanism] * plan.clip
    deviation = plan.noise * sensitivity
    size = flatten(initial_theta(study)).numel()
    facts |= {
        "delta": plan.delta,
        "epsilon": {
            "study": epsilon([rounds_of(study)], plan.delta),
            "round": epsilon([rounds_of(study, 1)], plan.delta),
            "study_if_replaced_at_most": epsilon([rounds_of(study)], plan.delta, "replace"),
            "study_by_renyi_at_most": renyi_epsilon([rounds_of(study)], plan.delta),
        },
        "sensitivity": sensitivity,
        "noise_deviation": deviation,
        "rounds_of_a_patient": plan.sampling * rounds,
        "numbers": size,
        "signal_to_noise": _signal_to_noise(study, deviation, size),
        "noise_for": {f"{cost:g}": noise_for(cost, plan.delta, plan.sampling, rounds) for cost in wanted},
    }
    if plan.mechanism == "patient-clip":
        facts["sums"] = asdict(sums := sums_of(study)) | {"support_noise": sums.support_noise}
    if patients is not None:
        facts["patients"] = {
            "site": patients,
            "round": plan.sampling * patients,
            "episode": plan.sampling * patients / parts,
            "delta_is_small": plan.delta * patients * 10 < 1,
        }
    return facts


def _signal_to_noise(study: Study, deviation: float, size: int) -> dict[str, float]:
    clip, sites = study.privacy.clip, study.sites.quorum
    if study.privacy.mechanism == "episode-clip":
        parts = study.episodes.per_round
        return {
            "site": signal_to_noise(parts, deviation, clip, size),
            "quorum": signal_to_noise(parts, deviation, clip, size, sites),
        }
    sums = sums_of(study)
    # As many patients as the study divides by, all their terms in one direction.
    longest = 1 + sums.curved * sums.steps * sums.rate
    return {
        "inner": signal_to_noise(sums.support_patients, sums.support_noise, clip, size),
        "site": signal_to_noise(1, sums.reply_noise, longest * clip, size),
        "quorum": signal_to_noise(1, sums.reply_noise, longest * clip, size, sites),
    }


def in_words(study: Study, facts: dict[str, Any]) -> Iterator[str]:
    """Return the lines that a person reads."""
    plan, parts = study.privacy, study.episodes.per_round
    yield f"{study.study.id}: {study.study.title}"
    yield f"  guarantee        {facts['guarantee']}"
    if plan.mechanism == "none":
        yield "                   meta-gradients can tell who was in the data: see docs/privacy.md"
        return
    if plan.research:
        yield "                   what follows holds for the same study without privacy.research"
    cost, ratio = facts["epsilon"], facts["signal_to_noise"]
    if sums := facts.get("sums"):
        taken = f"{sums['steps']} inner, {'as many back, ' if sums['curved'] else ''}one of queries"
        yield f"  mechanism        patient-clip, sampling rate {plan.sampling:g}: sums over patients, {taken}"
        yield f"                   every patient's term in each is clipped to {plan.clip:g}"
        yield (
            f"  noise            deviation {facts['noise_deviation']:g} on the sum of queries, "
            f"{sums['support_noise']:.4g} on each other one, by the site, before anything leaves it"
        )
    else:
        yield f"  mechanism        {plan.mechanism}: {parts} clipped to {plan.clip:g}, sampling rate {plan.sampling:g}"
        yield (
            f"  noise            {plan.noise:g} x sensitivity {facts['sensitivity']:g} = deviation "
            f"{facts['noise_deviation']:g}, by the site, before anything leaves it"
        )
    yield f"  epsilon          {rounded_up(cost['study'])} per patient and study, at delta {plan.delta:g}"
    yield f"                   {rounded_up(cost['round'])} for one round"
    yield (
        f"                   {rounded_up(cost['study_if_replaced_at_most'])} at most, where a patient is replaced by "
        "another"
    )
    yield f"                   {rounded_up(cost['study_by_renyi_at_most'])} by Renyi's bound, as a cross-check"
    yield f"  a patient        is in {facts['rounds_of_a_patient']:.3g} of {study.study.rounds} rounds on average"
    yield (
        f"  signal to noise  {ratio['site']:.2g} at most in a site's reply of {facts['numbers']:,} numbers, "
        f"{ratio['quorum']:.2g} in the mean of {study.sites.quorum}"
    )
    if "inner" in ratio:
        yield f"                   {ratio['inner']:.2g} at most in an inner step"
    for wanted, noise in facts["noise_for"].items():
        yield f"  epsilon {wanted:<8} needs privacy.noise = {noise:g}"
    if about := facts.get("patients"):
        there = f"  with {about['site']} patients: {about['round']:.3g} in a round"
        if sums:
            divided = sums["support_patients"] + sums["query_patients"]
            yield f"{there} on average; the study's shots and queries are for {divided}"
        else:
            yield f"{there}, {about['episode']:.3g} in an episode, on average"
        if not about["delta_is_small"]:
            yield f"  warning: delta should be below 1 / (10 x patients), {0.1 / about['site']:.1g}"
    yield "  It covers one site: someone who is a patient at several pays at each. See docs/privacy.md."
