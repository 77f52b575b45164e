"""Parse a user's template: a normal report in prose or as a form, with any headings."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cbedge.bundles.manifest import Manifest
from cbedge.drafting.codec import TextCodec
from cbedge.drafting.language import refuse_other_script
from cbedge.drafting.plan import EXTRA_TOKENS, MAX_NEW_TOKENS
from cbedge.drafting.template_checks import private_content, refuse_what_is_no_report
from cbedge.drafting.template_text import HEADING, is_not_drafted, lines_of, section_of
from cbedge.drafting.templates import Template
from cbedge.errors import ContextError
from cbedge.prompt import SPECIAL_TOKEN, remove_invisible
from cbedge.sentences import normalize, split_text

MAX_TEMPLATE_CHARACTERS = 4000
_EMPHASIS = re.compile(  # of Markdown, and its rules
    r"(\*{2,3}|(?<![\w*])[*_])(?=[\w(\[#])((?:(?!\1)[^*\n])+)(?<=\S)\1(?:(?<=\*\*)|(?!\w))|^\s*\*{4,}\s*$",
    re.MULTILINE,
)
_ANGLED = re.compile(r"<+([^\W\d_][\w ]*)>+[ \t]*:?")
_DRAFTS_HEADING = re.compile(r"\b(?:FINDINGS|IMPRESSION):")
_ENDED = re.compile(r"[.?!。！？][\"'”’»)\]]*$")


def parse_template(text: str) -> Template:
    """Parse a normal report: prose or a form, with any headings, labels, bullets or numbered items.

    Headings that mean FINDINGS or IMPRESSION (``CONCLUSION:``, ``Final impression``, ``=== BEFUND ===``) start that
    section. What holds for one study or person only is left out: the text of ``INDICATION:``, ``CLINICAL INFO:`` and
    the like, in their line or up to the findings' heading, other text before that heading, and sentences that look like
    a signature, a communication, a name, a place, a time, a date or a patient's data. Any other label (``Lungs:``)
    stays in front of its sentence; a heading on its own line is joined by a colon with the line below, and a question
    with its answer. A line without a full stop gets one; bullets, Markdown marks and invisible characters are removed;
    and a repeated sentence of a section is used once. No other character changes. Whatever is left out is told.

    Raises:
        ContextError: the template is not text, has no findings, is too long, is a file name or in another format than
            plain text, or has blanks to fill in, choices to make or a heading inside a sentence.
    """
    if not isinstance(text, str):
        raise ContextError(f"the template must be text, not {type(text).__name__}")
    if len(text) > MAX_TEMPLATE_CHARACTERS:
        raise ContextError(
            f"the template has {len(text):,} characters; the limit is {MAX_TEMPLATE_CHARACTERS:,}: shorten it"
        )
    text = _EMPHASIS.sub(r"\2", remove_invisible(text))
    text = _ANGLED.sub(lambda mark: mark[0] if section_of(mark[1], True) is None else f"{mark[1]}:", text)
    refuse_what_is_no_report(text)
    while SPECIAL_TOKEN.search(text):
        text = SPECIAL_TOKEN.sub(" ", text)
    sections, left_out = _sections_of(lines_of(text))
    for sentence in (*sections[0], *sections[1]):
        if inner := _DRAFTS_HEADING.search(sentence):
            raise ContextError(
                f"the template has {inner.group()} inside a sentence: put the heading on its own line, and use plain "
                "text"
            )
    if not sections[0]:
        raise ContextError("the template has no findings: give the sentences of a normal report")
    return Template(tuple(sections[0]), tuple(sections[1]), tuple(dict.fromkeys(left_out)))


def _sections_of(lines: Sequence[tuple[int, int, str]]) -> tuple[tuple[list[str], list[str]], list[str]]:
    """The sentences of findings and impression in numbered lines, and what was left out."""
    sections: tuple[list[str], list[str]] = ([], [])
    left_out: list[str] = []
    place, signed = 0, False
    passed_over = ""  # heading of what is not drafted, with its line
    names = [start[1] if (start := HEADING.match(f"{line}:")) else "" for _, _, line in lines]
    starts = [section_of(name, False) for name in names]
    concludes = 1 in starts
    # What stands before the first section if the findings have their heading ("Results" may be any label).
    preamble = any(section == section_of(name, True) == 0 for section, name in zip(starts, names, strict=True))
    begun = -1  # paragraph of that heading
    for index, (number, paragraph, line) in enumerate(lines):
        following = next((start for (_, at, _), start in zip(lines, starts, strict=True) if at == paragraph + 1), 1)
        # Its text goes on up to the findings' heading or another label; without that heading, if other text than a
        # heading follows, up to a blank line, else to the end of its line.
        if 0 not in starts[index:] and not (paragraph == begun and following is None):
            passed_over = ""
        for sentence in split_text(line):
            heading = HEADING.match(sentence)
            name, rest = (heading[1], sentence[heading.end() :]) if heading else (sentence.rstrip(" .:："), "")
            section = section_of(name, bool(sections[0]) and not concludes)
            if section is not None:
                place, sentence, passed_over, preamble = section, rest, "", False
            elif heading:
                passed_over = f"{name.upper()} (line {number})" if is_not_drafted(name) else ""
                begun, sentence = (paragraph, rest) if passed_over else (begun, sentence)
            complete = _ENDED.search(sentence)
            signed = signed and section is None and not complete
            if not re.search(r"\w", sentence):
                continue
            sentence = sentence if complete else f"{sentence.rstrip(' ,;')}."
            told = f"Line {number} of the template {{}}: this sentence was left out."
            if passed_over:
                left_out.append(f"The template's {passed_over} holds for one study only and was left out.")
            elif kind := private_content(sentence) or ("a signature" if signed else None):
                signed = kind == "a signature"
                left_out.append(told.format(f"has what looks like {kind}"))
            elif preamble:
                left_out.append(told.format("stands before its findings"))
            elif normalize(sentence) in map(normalize, sections[place]):
                left_out.append(told.format("repeats a sentence of its section"))
            else:
                sections[place].append(sentence)
    return sections, left_out


def read_template(text: str) -> str:
    """Parse a normal report and format it as ``FINDINGS: … IMPRESSION: …``; see :func:`parse_template`.

    Raises:
        ContextError: as :func:`parse_template`.
    """
    return parse_template(text).text


def check_template(manifest: Manifest, text: str, codec: TextCodec) -> Template:
    """Parse and check a user's template for a bundle; see :func:`parse_template`.

    Raises:
        ContextError: the text is not a normal report, its script is not supported, the tokenizer cannot represent it,
            it is too long, or the model has no image scores to check it against.
    """
    template = parse_template(text)
    refuse_other_script((*template.findings, *template.impression))
    if manifest.image_findings is None:
        raise ContextError(f"{manifest.name} has no image scores to check a template against: leave the template out")
    count = EXTRA_TOKENS
    for sentence in (*template.findings, *template.impression):
        ids = codec.encode(f" {sentence}")
        count += len(ids)
        if codec.decode(ids).strip() != sentence:
            raise ContextError(
                f"the tokenizer of {manifest.name} cannot write {sentence[:60]!r} of the template: reword it"
            )
    if count > MAX_NEW_TOKENS:
        raise ContextError(
            f"the template has {count - EXTRA_TOKENS} tokens; the limit is {MAX_NEW_TOKENS - EXTRA_TOKENS}: shorten it"
        )
    return template
