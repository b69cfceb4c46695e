import pytest

from weakmedsam.errors import ConfigError
from weakmedsam.run.cli_errors import ending_in_a_message


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (ConfigError("ROUNDS=0: mend it"), "\nweakmedsam: ConfigError: ROUNDS=0: mend it"),
        (KeyboardInterrupt(), "\nstopped. The same command continues where it was."),
        (SystemExit(75), 75),
    ],
)
def test_what_a_user_can_mend_ends_in_one_message(raised, message):
    with pytest.raises(SystemExit) as left, ending_in_a_message("where it was"):
        raise raised
    assert left.value.code == message


def test_a_fault_of_the_program_stays_what_it_is():
    with pytest.raises(ZeroDivisionError), ending_in_a_message("where it was"):
        raise ZeroDivisionError
