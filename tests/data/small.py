"""Small chat templates in which each thing that real ones do stands alone, and random conversations for them."""

from __future__ import annotations

from hypothesis import strategies as st

from schoolhouse.types import Conversation, Message, Origin, Part

LOOP = "{% for m in messages %}BODY{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"


def body(text: str, prompt: str = "[a]") -> str:
    """A template that writes each message with this text."""
    return LOOP.replace("BODY", text).replace("%}[a]{%", "%}" + prompt + "{%")


PLAIN = body("{% if m.role == 'assistant' %}[a]{{ m.content }}</s>{% else %}[u]{{ m.content }}{% endif %}")
"""Every prompt begins with what stood before: `one`."""
TRIMMED = body("[{{ m.role[0] }}]{{ m.content | trim }}</s>")
"""Blanks around contents are dropped."""
FORGETFUL = body(
    "[{{ m.role[0] }}]{% if loop.last and m.role == 'assistant' %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}</s>"
)
"""The last answer is written with its thinking, which history drops: `split`."""
PREFILLED = body("[{{ m.role[0] }}]{{ m.content }}</s>", "[a]<think>\n\n</think>\n\n")
"""The prompt ends in an empty thinking block that the full text drops."""
ANOTHER_END = body("[{{ m.role[0] }}]{{ m.content }}{{ '<end>' if loop.last and m.role == 'assistant' else '</s>' }}")
"""The last turn ends with another token than those before it, as in gpt-oss: `split`."""
HEADLESS = body("[{{ m.role[0] }}]{{ m.content }}</s>", "")
"""The prompt does not ask for the answer: the model writes its own header."""
SYSTEM_LAST = (
    "{% for m in messages %}{% if m.role != 'system' %}{% if loop.last %}{{ messages[0].content }}{% endif %}"
    "[{{ m.role[0] }}]{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}[a]{% endif %}"
)
"""Something of the conversation moves to its end, as in Mistral's: the full text contradicts the prompt."""
TEACHABLE = (PLAIN, TRIMMED, PREFILLED, ANOTHER_END, HEADLESS, FORGETFUL)
STOPS = ("</s>", "<end>")

letters = st.text(st.sampled_from("ab é\n好<[]/s>"), min_size=1, max_size=8).filter(
    lambda text: text.strip() and not any(stop in f"{text}" for stop in STOPS)
)
weights = st.sampled_from([None, None, 0.0, 0.5, 1.0, 2.0])


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """Rounds of user and assistant, perhaps after a system prompt; answers have weights and reasoning at times."""
    messages = [Message("system", (Part("text", draw(letters)),))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 5))):
        messages.append(Message("user", (Part("text", draw(letters)),)))
        messages.append(Message("assistant", (Part("text", draw(letters)),), weight=draw(weights)))
    return Conversation(tuple(messages), Origin("made", 1))
