"""Settings exist once; everything wrong with a configuration is said at once, with a suggestion."""

from pathlib import Path

import pytest

from sdlora.config import Config, all_settings
from sdlora.config_io import load_config, to_toml
from sdlora.errors import ConfigError


def test_names_and_flags_are_unique_and_every_setting_has_help():
    settings = list(all_settings())
    assert len({s.key for s in settings}) == len({s.flag for s in settings}) == len(settings)
    assert all(s.field.description for s in settings)


def test_defaults_round_trip_through_toml(tmp_path):
    for comments in (False, True):
        file = tmp_path / "config.toml"
        file.write_text(to_toml(Config(), comments=comments))
        assert load_config(file) == Config()


def test_any_configuration_round_trips_through_toml(tmp_path):
    config = load_config(
        None,
        {
            "data.images": 'a "quoted" \\ folder/テスト',
            "lora.alpha": 0.5,
            "samples.sample_prompts": ["a castle --w 64", "line\nbreak"],
            "train.steps": "7",
            "data.flip": True,
            "optimizer.learning_rate": 1e-7,
        },
    )
    file = tmp_path / "config.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    assert load_config(file) == config
    assert config.train.steps == 7
    assert config.data.images == Path('a "quoted" \\ folder/テスト')


def test_later_sources_win(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("[lora]\nrank = 4\nalpha = 2\n[train]\nsteps = 10\n")
    config = load_config(file, {"lora.rank": "8", "train.epochs": "3"}, ("lora.rank=32", "data.trigger=my word"))
    assert (config.lora.rank, config.lora.alpha, config.data.trigger) == (32, 2, "my word")
    assert (config.train.epochs, config.train.steps) == (3, None)


def test_all_problems_are_reported_at_once(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text('[data]\nbatch_size = "two"\n[lora]\nalhpa = 2\n[trian]\nsteps = 5\n')
    with pytest.raises(ConfigError) as error:
        load_config(file, {"lora.rank": "0", "optimizer.learning_rate": "-1"}, ("train.sede=3", "nonsense"))
    text = str(error.value)
    for part in (
        "7 problems",
        "data.batch_size must be a valid integer",
        "unknown setting lora.alhpa; did you mean lora.alpha?",
        "did you mean train?",
        "lora.rank must be at least 1, got 0",
        "optimizer.learning_rate must be above 0, got -1",
        "train.sede; did you mean train.seed?",
        "--set nonsense: write it as section.key=value",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"train.steps": 5, "train.epochs": 2}, "give one of them"),
        ({"lora.conv_rank": 4}, 'need lora.targets = "conv"'),
        ({"data.keep_tags": 2}, "no effect unless data.shuffle_tags"),
        ({"data.num_crops": 9}, "no effect unless data.crop"),
        ({"data.trigger_place": "end"}, "no effect without data.trigger"),
        ({"lora.rank": True}, "lora.rank must not be true"),
        ({"data.images": ""}, "data.images is empty"),
        ({"optimizer.text_encoder_learning_rate": 1e-5}, "no effect unless lora.text_encoder"),
        ({"output.name": "a/b"}, "plain file name"),
        ({"output.name": "{x"}, "plain file name"),
        ({"lora.targets": "everything"}, "must be 'attention', 'attention\\+ff' or 'conv', got 'everything'"),
        ({"optimizer.learning_rate": "nan"}, "finite"),
    ],
)
def test_contradictions_are_refused(flags, match):
    with pytest.raises(ConfigError, match=match):
        load_config(None, flags)


def test_a_number_is_a_fine_trigger_word():
    assert load_config(assignments=("data.trigger=2024", "output.name=007")).data.trigger == "2024"


def test_a_key_outside_its_section_is_pointed_home(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("rank = 4\n")
    with pytest.raises(ConfigError, match=r"did you mean lora\.rank"):
        load_config(file)


@pytest.mark.parametrize("text", ["[lora\n", b"\xff\xfe[lora]"])
def test_a_broken_file_is_named(tmp_path, text):
    file = tmp_path / "broken.toml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=r"cannot read the configuration .*broken\.toml"):
        load_config(file)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no configuration file"):
        load_config(tmp_path / "none.toml")


def test_shipped_configurations_load():
    files = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))
    assert files
    for file in files:
        load_config(file)
