"""What is gained over a reference, and at what cost."""

from fastgrpo.record.comparison import gains


def row(stage: str, problem: str, tokens: float, reward: float, **solved: float) -> dict[str, object]:
    return {"stage": stage, "problem_id": problem, "worker_tokens": tokens, "reward": reward} | solved


def test_gains_are_paired_by_problem_and_cost_is_that_of_the_same_problems() -> None:
    """Only b is asked p2, and nothing tells whether q, which has no tests, was solved."""
    rows = [
        row("a", "p0", 100, 0.0, solved=0.0),
        row("a", "p0", 100, 0.0, solved=1.0),
        row("a", "p1", 300, 0.5, solved=1.0),
        row("a", "q", 10_000, 0.5),
        row("b", "p0", 300, 1.0, solved=1.0),
        row("b", "p1", 300, 0.5, solved=1.0),
        row("b", "p2", 900, 0.0, solved=0.0),
        row("b", "q", 10_000, 0.8),
    ]
    # Points (50 + 0) / 2; reward (1.0 + 0.0 + 0.3) / 3; tokens 600 / 400, so 25 points for 50 %.
    line = gains(rows, "a").splitlines()[2].split(" | ")
    assert [line[1][:5], line[2][:6], line[3], line[4]] == ["25.0 ", "0.433 ", "1.50", "50.00 |"]
