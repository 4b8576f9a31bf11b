"""Rules that read the ends of epochs: does the model learn by heart, too little, or nothing more?

They compare what training and validation cost with each other, and with the entropy of the answers.  Answers
that are as often right as they are sure cost their entropy in the mean, so validation that costs more shows
a model that grows sure of what it learned by heart, an epoch or more before the validation loss rises.  The
loss of a training epoch is the mean over its steps, so it lags half an epoch behind.

Evaluation comes once an epoch: a rise from one evaluation to the next cannot be told before it.
"""

from __future__ import annotations

from collections.abc import Sequence

from distbp.metrics.finding import STUCK, Finding
from distbp.metrics.history import Epoch, History

__all__ = ["overfitting", "settled", "underfitting"]

_TWO_MISTAKES = 10.0
"""Nats that two answers cost which are surely wrong: with few samples that is chance."""


def overfitting(history: History) -> Finding | None:
    """The training loss falls; the validation loss is past its best, or stays and its answers grow surer.

    Both by more than chance or a trifle: see `_has_risen` and `_is_sure_and_wrong`.
    """
    epochs = [epoch for epoch in history.epochs if epoch.validation_loss is not None]
    if len(epochs) < 2:
        return None
    risen, wrong = _has_risen(history, epochs), _is_sure_and_wrong(history, epochs)
    then = min(epochs if risen else epochs[:-1], key=_validation_loss)
    now, last, best = epochs[-1], _validation_loss(epochs[-1]), _validation_loss(then)
    if not (risen or wrong) or best >= STUCK * history.reference:
        return None
    rose = "rose" if last > best else "hardly moved"
    message = (
        f"the model learns the training samples by heart: since step {then.step} the training loss fell from "
        f"{then.loss:.3g} to {now.loss:.3g}, and the validation loss {rose}, from {best:.3g} to {last:.3g} "
        f"({last / best - 1:+.1%})"
    )
    sure, before = now.validation_entropy, then.validation_entropy
    if wrong:
        message += f"; its answers there are surer than right: so sure, they should cost {sure:.3g}"
    elif sure is not None and before is not None and sure < before:
        message += f"; its answers grew surer all the same, to an entropy of {sure:.3g} nats"
    return Finding(
        "overfitting",
        now.step,
        message,
        f"stop {'near that step' if last > best else 'when it rises'} (train.max_steps), "
        "take a smaller model (model.hidden), more data or "
        "augmentation (data.augment_noise), or set optimizer.weight_decay",
        {"best_step": then.step, "best": best, "validation_loss": last, "loss": now.loss, "entropy": sure},
    )


def _has_risen(history: History, epochs: Sequence[Epoch]) -> bool:
    """Return whether the validation loss is past its best, not by chance, while the training loss falls.

    Either it has stayed higher for two epochs, by more than two mistakes cost and by 2 % of the reference;
    or the two are 10 % of the reference apart, and the training loss is less than half of it, or less than
    three quarters while it has stayed 1.5 % higher for two epochs.
    """
    losses = [_validation_loss(epoch) for epoch in epochs]
    place = min(range(len(losses)), key=losses.__getitem__)
    best, last, since = losses[place], losses[-1], len(losses) - 1 - place
    if since == 0 or epochs[-1].loss > min(0.95 * epochs[place].loss, 0.9 * last):
        return False
    floor = max(0.02 * history.reference, _TWO_MISTAKES / max(history.facts.answers, 1))
    lasting = min(losses[-2:]) - best if since > 1 else 0.0
    # The farther apart, the less of a rise is waited for: the next epoch may bring more than all before.
    part = epochs[-1].loss / last if last - epochs[-1].loss >= 0.1 * history.reference else 1.0
    return lasting >= max(0.03 * best, floor) or (part <= 0.75 and lasting >= 0.015 * best) or part <= 0.5


def _is_sure_and_wrong(history: History, epochs: Sequence[Epoch]) -> bool:
    """Return whether validation costs more than the answers' own entropy, ever more so, and no longer falls.

    What was learned by heart makes answers surer and no better, and that shows before the loss rises.  A step
    that was too large does so as well, but then training costs more than its entropy, too.
    """
    before, now = epochs[-2:]
    if before.validation_entropy is None or now.validation_entropy is None or now.entropy is None:
        return False
    last = _validation_loss(now)
    excess, earlier = last - now.validation_entropy, _validation_loss(before) - before.validation_entropy
    # A quarter of what there is to know: high rates bring a tenth now and then, and take it back.
    floor = max(0.25 * history.reference, _TWO_MISTAKES / max(history.facts.answers, 1))
    falls = last < 0.98 * min(map(_validation_loss, epochs[:-1]))
    if falls or excess < max(floor, earlier) or now.loss - now.entropy > 0.5 * excess:
        return False
    return now.loss <= min(0.95 * before.loss, 0.75 * last)


def _validation_loss(epoch: Epoch) -> float:
    """Return the validation loss of an epoch that has one."""
    assert epoch.validation_loss is not None, "an epoch without validation"
    return epoch.validation_loss


def underfitting(history: History) -> Finding | None:
    """Half of what there was to learn is not learned, not even of the training samples, and no more is."""
    epochs, reference, facts = history.epochs, history.reference, history.facts
    window = max(2, len(epochs) // 3)
    if len(epochs) < 6 or epochs[-1].step < 0.5 * facts.total_steps:
        return None
    # At the end of a schedule a loss stands still because the rate does, whatever the model could learn.
    if history.looks and history.looks[-1].lr < 0.25 * facts.peak_lr:
        return None
    last, before = epochs[-1], epochs[-1 - window]
    if not (last.loss > 0.5 * reference and last.loss > 0.97 * before.loss):
        return None
    if last.validation_loss is not None and last.validation_loss > 1.2 * last.loss:
        return None
    unsure = ""
    if last.entropy is not None and facts.classes is not None:
        if last.entropy < 0.4 * reference:
            return None
        unsure = (
            f"; the entropy of its answers is {last.entropy:.3g} nats, that of a guess among "
            f"{facts.classes} classes {reference:.3g}"
        )
    return Finding(
        "underfitting",
        last.step,
        f"the model fits not even the training samples: their loss of {last.loss:.3g} is "
        f"{last.loss / reference:.0%} of that of knowing nothing, and fell by "
        f"{max(0.0, 1 - last.loss / before.loss):.1%} in the last {window} epochs{unsure}",
        "take a larger model (model.hidden, model.name), less optimizer.weight_decay, or other features; a "
        "loss that still falls wants a higher optimizer.lr (distbp lr-find) or more train.epochs",
        {"loss": last.loss, "reference": reference, "entropy": last.entropy},
    )


def settled(history: History) -> Finding | None:
    """Loss and entropy have not moved for five epochs and more, and a quarter of the run is still to come."""
    facts, epochs = history.facts, history.epochs
    planned = facts.total_steps * facts.batch_size / facts.samples
    window = max(5, round(0.15 * planned))
    if len(epochs) <= window or epochs[-1].step > 0.75 * facts.total_steps:
        return None
    recent = epochs[-1 - window :]
    rows = (
        [one.loss for one in recent],
        [one.entropy for one in recent],
        [one.validation_loss for one in recent],
    )
    if recent[-1].loss > 0.8 * history.reference or not all(_still(row) for row in rows):
        return None
    return Finding(
        "settled",
        epochs[-1].step,
        f"the training has settled: in the last {window} epochs neither loss nor entropy moved by 1 %",
        "stop here, or lower the learning rate (schedule.name=cosine)",
        {"loss": recent[-1].loss, "entropy": recent[-1].entropy, "epochs": window},
    )


def _still(values: Sequence[float | None]) -> bool:
    """Return whether values stay within 1 % of the largest; what is not known does not move."""
    known = [value for value in values if value is not None]
    return not known or max(known) - min(known) <= 0.01 * max(map(abs, known))
