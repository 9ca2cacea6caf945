"""Ollama's TEMPLATE, rendered by Go."""

from collections.abc import Sequence

import pytest

from tests.helpers.standins import go as go_process


class Go(go_process.Go):
    """One process that renders whatever it is asked."""

    def __call__(self, template: str, messages: Sequence[dict], system: str = "") -> str:
        answer = self.ask(Template=template, System=system, Messages=list(messages))
        assert "error" not in answer, answer["error"]
        return answer["text"]

    def commands(self, modelfile: str) -> list[tuple[str, str]]:
        """(command or parameter, value), as Ollama's parser reads them."""
        return [tuple(pair) for pair in self.ask(Modelfile=modelfile)]


@pytest.fixture(scope="session")
def go():
    made = Go()
    yield made
    made.close()


def between(text: str, word: str) -> str:
    """What the Modelfile says after TEMPLATE or SYSTEM."""
    return text.split(f'{word} """')[1].split('"""')[0]
