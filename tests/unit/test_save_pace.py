"""States are saved at the steps that are asked for, or as often as costs little."""

from llm_vtrans.training.save_pace import SHARE, STEPS, SavePace


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def pass_by(self, seconds: float) -> None:
        self.now += seconds


def saved_steps(every: int, num_steps: int, step_seconds: float, save_seconds: float) -> list[int]:
    clock, found = Clock(), []
    pace = SavePace(every, clock)
    for step in range(1, num_steps + 1):
        clock.pass_by(step_seconds)
        if pace.is_due(step):
            found.append(step)
            pace.save(lambda: clock.pass_by(save_seconds))
    return found


def test_fixed_steps_whatever_they_cost() -> None:
    assert saved_steps(3, 10, 1.0, 1000.0) == [3, 6, 9]


def test_cheap_states_are_saved_at_every_look() -> None:
    assert saved_steps(0, 4 * STEPS, 1.0, 1.0) == [STEPS * n for n in (1, 2, 3, 4)]


def test_dear_states_wait_until_their_time_is_a_small_share() -> None:
    cost = 3.5 * STEPS * SHARE  # pays after three and a half looks
    assert saved_steps(0, 10 * STEPS, 1.0, cost) == [STEPS, 5 * STEPS, 9 * STEPS]
