"""How many adapters get a label in metrics, and which."""

from __future__ import annotations

import random

from deployments.observability.label_cap import OTHER, LabelCap


def test_every_name_has_its_label_while_there_are_few():
    cap = LabelCap(3)
    assert [cap.label(name) for name in ("a", "b", "c", "a")] == ["a", "b", "c", "a"]
    assert cap.label("d") == OTHER


def test_a_busy_late_name_gets_a_label_and_the_number_of_labels_is_bounded():
    cap = LabelCap(2)
    for name in ("a", "b"):
        cap.label(name)
    assert [cap.label("late") for _ in range(3)] == [OTHER, "late", "late"]
    seen = {cap.label(f"n{number % 50}", weight=number) for number in range(1000)}
    assert len(seen | {"a", "b", "late"}) <= 5 and OTHER in seen
    assert cap.label("a") == "a", "a label that was given stays"


def test_thousands_of_names_cost_a_bounded_table_and_the_hot_ones_are_told_apart():
    draw = random.Random(1)
    cap = LabelCap(10)
    labels = [cap.label(f"n{min(int(draw.paretovariate(1.0)), 5000)}") for _ in range(20_000)]
    assert len(cap._counts) <= 80 and len(set(labels)) <= 21
    assert {f"n{rank}" for rank in range(1, 6)} <= set(labels[-1000:])


def test_none_at_all():
    assert LabelCap(0).label("a") == OTHER
