"""What every test needs before anything else: our TLS settings, which must be in place before grpc is imported.

And at the end what tests have measured: the property "measured" of those that passed, a line each.
"""

import pytest

import maskwork.net  # noqa: F401


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was measured, also by the workers of a run in parallel."""
    for report in terminalreporter.stats.get("passed", ()):
        for name, value in report.user_properties:
            if name == "measured":
                terminalreporter.write_line(f"measured: {value}")
