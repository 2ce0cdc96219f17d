"""openai/summarize_from_feedback, configuration `comparisons`: two summaries of a Reddit post and a choice."""

from __future__ import annotations

from collections.abc import Mapping

from rpo_jax.data.layouts.fields import Fields, Unusable, label_field, list_field, object_field, text_field
from rpo_jax.data.layouts.layout import Layout, per_row
from rpo_jax.data.layouts.parts import Parts, pair


def parse(values: Fields) -> Parts:
    """The prompt states subreddit, title and post and ends with "TL;DR:"; a response is " " and the summary.

    The summary is stripped first, so that the one space joins it to the prompt. News articles, which have no
    subreddit, are refused. Source: arXiv 2009.01325, Appendix B.
    """
    info = object_field(values, "info")
    if info.get("subreddit") is None or info.get("post") is None:
        raise Unusable("not a Reddit post: 'info' has no subreddit or no post")
    subreddit, title, post = (text_field(info, name) for name in ("subreddit", "title", "post"))
    if not post.strip():
        raise Unusable("empty prompt: the post has no text")
    summaries = list_field(values, "summaries")
    if len(summaries) != 2 or not all(isinstance(summary, Mapping) for summary in summaries):
        raise Unusable("column 'summaries' does not hold two objects")
    choice = int(label_field(values, "choice", "0 nor 1"))
    prompt = f"SUBREDDIT: r/{subreddit}\nTITLE: {title}\nPOST: {post}\nTL;DR:"
    chosen, rejected = (text_field(summaries[index], "text").strip() for index in (choice, 1 - choice))
    return pair(prompt, f" {chosen}", f" {rejected}")


LAYOUT = Layout(
    read=per_row(parse),
    columns=("info", "summaries", "choice"),
    prompt=("info",),
    truncation_side="keep_start",
    description="openai/summarize_from_feedback comparisons, the Reddit part: info, two summaries, choice",
)
