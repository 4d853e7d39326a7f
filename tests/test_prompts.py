"""Prompts: one begin token, no end token, the checkpoint's chat template where it has one, the layouts of Video-LLaVA."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from conftest import SHARED, needs
from transformers import AutoTokenizer

from feature_alignment.cli.config import Common
from feature_alignment.cli.console import UserError
from feature_alignment.models import eventgpt, pair, video_llava
from feature_alignment.models.preprocessing import check_shared_ids, load_tokenizer

MODELS = ("eventgpt", "video_llava")
QUESTION = "What is this scene about?"
CASES = SHARED / "public_cases"


def prompt(name, tokenizer, question=QUESTION):
    return eventgpt.encode_prompt(tokenizer, question) if name == "eventgpt" else video_llava.encode_prompt(tokenizer, question, 7)


def special(token):
    return {"SpecialToken": {"id": token, "type_id": 0}}


def processors():
    text = {"Sequence": {"id": "A", "type_id": 0}}
    begin, end = special("<s>"), special("</s>")
    known = {t: {"id": t, "ids": [i], "tokens": [t]} for t, i in (("<s>", 1), ("</s>", 2))}
    make = lambda single: {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": known}  # noqa: E731
    return {
        "none": None,
        "text alone": make([text]),
        "begin": make([begin, text]),
        "end": make([text, end]),
        "begin and end": make([begin, text, end]),
    }


@pytest.fixture
def altered(tiny_run, tmp_path):
    """A copy of a checkpoint's directory without weights, with other keys in tokenizer.json and tokenizer_config.json."""

    def make(name, processor="begin", template=None, **config):
        shutil.copytree(tiny_run / "pair" / name, tmp_path / name, ignore=shutil.ignore_patterns("*.safetensors"), dirs_exist_ok=True)
        content = json.loads((tmp_path / name / "tokenizer.json").read_text())
        (tmp_path / name / "tokenizer.json").write_text(json.dumps({**content, "post_processor": processors()[processor]}))
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text())
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps({**settings, **config}))
        for file in ("chat_template.jinja", "chat_template.json"):
            (tmp_path / name / file).unlink(missing_ok=True)
            if template and file in template:
                (tmp_path / name / file).write_text(template[file])
        return tmp_path / name

    return make


@pytest.mark.parametrize("processor", processors())
@pytest.mark.parametrize("name", MODELS)
def test_the_prompt_does_not_depend_on_what_the_tokenizer_adds(tiny_run, altered, name, processor):
    wanted = prompt(name, load_tokenizer(tiny_run / "pair" / name))
    tokenizer = load_tokenizer(altered(name, processor))
    assert tokenizer("").input_ids == {"begin": [1], "end": [2], "begin and end": [1, 2]}.get(processor, [])
    assert prompt(name, tokenizer) == wanted
    assert wanted[0] == 1 and wanted.count(1) == 1 and 2 not in wanted
    if name == "eventgpt":
        before, after = eventgpt.PROMPT.format(question=QUESTION).split("<event>")
        at = wanted.index(-200)
        assert wanted.count(-200) == 1 and tokenizer.decode(wanted[1:at]) == before and tokenizer.decode(wanted[at + 1 :]) == after


@pytest.mark.parametrize("setting", [{"add_bos_token": False}, {"add_eos_token": True}, {"add_bos_token": False, "add_eos_token": True}])
@pytest.mark.parametrize("name", MODELS)
def test_settings_of_the_tokenizer_change_no_prompt(tiny_run, altered, name, setting):
    assert prompt(name, load_tokenizer(altered(name, **setting))) == prompt(name, load_tokenizer(tiny_run / "pair" / name))


def test_a_bos_that_is_not_added_and_not_llamas_is_left_out(altered):
    """A vocabulary of another kind: its first token is a mark of the chat template, not of every text."""
    tokenizer = load_tokenizer(altered("eventgpt", "none"))
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    ids = prompt("eventgpt", tokenizer)
    assert tokenizer.bos_token_id not in ids
    at = ids.index(-200)
    assert tokenizer.decode(ids[at + 1 :]).startswith("<ev_end>\n"), "the first token after the events is no begin token"


def test_the_log_says_that_a_tokenizer_adds_no_begin_token(altered, caplog):
    caplog.set_level("INFO")
    load_tokenizer(altered("eventgpt", "none"))
    assert "does not add <s>; it is added to prompts" in caplog.text


def test_two_tokenizers_share_ids_whatever_they_add(altered):
    paths = altered("eventgpt", "none"), altered("video_llava", "begin and end")
    check_shared_ids(paths[0], load_tokenizer(paths[0]), paths[1], load_tokenizer(paths[1]))


# ---- chat templates

PARTS = (
    "{% for m in messages %}{{ m['role'].upper() + ': ' }}{% for p in m['content'] | selectattr('type', 'equalto', 'video') %}"
    "{{ '<video>\n' }}{% endfor %}{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
TEXT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} [end]{% endfor %}[assistant]"
ONLY_TEXT_PARTS = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'][0]['text'] + '' }}{% endfor %}[assistant]"


def text_of(tokenizer, ids):
    assert ids[0] == 1 and ids.count(1) == 1 and 2 not in ids
    return tokenizer.decode([i for i in ids[1:] if i != eventgpt.EVENT_TOKEN_INDEX])


@pytest.mark.parametrize("place", ["tokenizer_config", "jinja", "json"])
@pytest.mark.parametrize("processor", ["none", "begin", "begin and end"])
def test_a_chat_template_makes_the_prompt(altered, place, processor):
    for name, template, wanted in (
        ("video_llava", PARTS, f"USER: {'<video>' * 7}\n{QUESTION} ASSISTANT:"),
        ("video_llava", TEXT, f"[user] {'<video>' * 7}\n{QUESTION} [end][assistant]"),
        ("eventgpt", TEXT, f"[user] <ev_start><ev_end>\n{QUESTION} [end][assistant]"),
        ("eventgpt", ONLY_TEXT_PARTS, f"[user] <ev_start><ev_end>\n{QUESTION}[assistant]"),
    ):
        if place == "tokenizer_config":
            path = altered(name, processor, chat_template=template)
        else:
            content = template if place == "jinja" else json.dumps({"chat_template": template})
            path = altered(name, processor, {f"chat_template.{place}": content}, chat_template=None)
        tokenizer = load_tokenizer(path)
        squeezed = text_of(tokenizer, prompt(name, tokenizer)).replace(" <", "<").replace("> ", ">")
        assert squeezed.strip() == wanted.replace(" <", "<").replace("> ", ">"), name


@pytest.mark.parametrize("question", ["A", "What 'type' of car is it?", "USER", " Where? "])
def test_any_question_goes_through_a_template(altered, question):
    for name, template in (("video_llava", PARTS), ("video_llava", TEXT), ("eventgpt", TEXT), ("eventgpt", ONLY_TEXT_PARTS)):
        tokenizer = load_tokenizer(altered(name, chat_template=template))
        assert question.strip() in text_of(tokenizer, prompt(name, tokenizer, question))


def test_an_eos_at_the_end_of_a_template_is_removed(altered):
    for name in MODELS:
        tokenizer = load_tokenizer(altered(name, chat_template=TEXT + "{{ eos_token }}"))
        assert 2 not in prompt(name, tokenizer)


def test_the_template_of_the_released_video_llava_gives_the_prompt_it_was_trained_with(tiny_run, altered):
    tokenizer = load_tokenizer(altered("video_llava", template={"chat_template.json": json.dumps({"chat_template": PARTS})}))
    assert prompt("video_llava", tokenizer) == prompt("video_llava", load_tokenizer(tiny_run / "pair" / "video_llava"))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ raise_exception('only in twos') }}", "only in twos"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "does not make a prompt with one"),
        ("{{ messages[0]['content'] }}{{ messages[0]['content'] }}", "does not make a prompt with one"),
        ("<video><event>ASSISTANT:", "does not make a prompt with one"),
        ("{% if %}", "does not make a prompt with one"),
    ],
)
@pytest.mark.parametrize("name", MODELS)
def test_a_template_without_the_marker_or_the_question_is_refused(altered, name, template, why):
    tokenizer = load_tokenizer(altered(name, chat_template=template))
    with pytest.raises(UserError, match=why):
        prompt(name, tokenizer)


@pytest.mark.parametrize("name", MODELS)
def test_a_template_that_fails_is_quoted_by_the_first_line_of_its_first_error(altered, name):
    """Each form of the message is tried: a text and a list of parts."""
    first, second = ("is not string", "is string") if name == "video_llava" else ("is string", "is not string")
    long = "x" * 200
    template = (
        f"{{% if messages[0]['content'] {first} %}}{{{{ raise_exception('\n{long}\nmore') }}}}{{% endif %}}"
        f"{{% if messages[0]['content'] {second} %}}{{{{ raise_exception('later') }}}}{{% endif %}}"
    )
    with pytest.raises(UserError, match=rf"and the question \({'x' * 160}\)\. Take"):
        prompt(name, load_tokenizer(altered(name, chat_template=template)))


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_damaged_template_file_is_named(altered, content):
    with pytest.raises(UserError, match=r"chat_template\.json: .*expected an object with chat_template"):
        load_tokenizer(altered("eventgpt", template={"chat_template.json": content}))


# ---- PKU's own layout


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"], "mm_video_tower": "LanguageBind/LanguageBind_Video_merge"},
        {"model_type": "llava", "mm_image_tower": "LanguageBind/LanguageBind_Image", "mm_projector_type": "mlp2x_gelu"},
        {"model_type": "llava_llama", "hidden_size": 4096},
        {"model_type": "llama", "architectures": ["LlavaLlamaForCausalLM"]},
        {"model_type": "llama", "mm_vision_tower": "openai/clip"},
    ],
)
def test_the_layout_of_the_llava_code_is_refused_with_a_remedy(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"layout of the LLaVA code(.|\n)*--target_id hub:LanguageBind/Video-LLaVA-7B-hf\n(.|\n)*convert_video"
    ):
        pair.load_target(Common(target_id=tmp_path))


@pytest.mark.parametrize(
    "config", [[], {}, {"model_type": "llama", "mm_video_tower": None}, {"model_type": "llava", "text_config": {}}, "cut off"]
)
def test_any_other_config_is_left_to_the_loader(tmp_path, config):
    (tmp_path / "config.json").write_text("{" if config == "cut off" else json.dumps(config))
    video_llava.refuse_llava_layout(tmp_path)
    video_llava.refuse_llava_layout(tmp_path / "absent")


@needs(CASES)
@pytest.mark.parametrize("how", ["nobos", "eos"])
def test_the_public_cases(tiny_run, tmp_path, how):
    for name in MODELS:
        source = tiny_run / "pair" / name
        subprocess.run([sys.executable, CASES / "c1c2_make.py", source, tmp_path / name, how], check=True)
        assert AutoTokenizer.from_pretrained(tmp_path / name)("").input_ids == ([] if how == "nobos" else [1, 2])
        assert prompt(name, load_tokenizer(tmp_path / name)) == prompt(name, load_tokenizer(source))
