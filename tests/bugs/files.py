"""Mistakes in checkpoints and in the data that is read."""

from __future__ import annotations

from bugs.bug import ATOMIC_SAVE, FUZZ, LOAD, MALFORMED, POSITIONS, SAVE, Bug

FILES_BUGS = (
    # checkpoint
    Bug(
        "zip-record-marked-as-a-folder-read",
        "beit3_fast/checkpoint/torch_file.py",
        "if info.is_dir() or info.external_attr & _FOLDER:",
        "if info.is_dir():",
        ("tests/checkpoint/test_malformed_files.py",),
    ),
    Bug(
        "keys-prefix-covers-part-of-a-name",
        "beit3_fast/checkpoint/keys.py",
        'name.startswith(p.rstrip(".") + ".")',
        'name.startswith(p.rstrip("."))',
        (f"{LOAD}::test_prefixes_cover_whole_parts_of_names_only",),
    ),
    Bug(
        "positions-corners-aligned",
        "beit3_fast/checkpoint/positions.py",
        "align_corners=False)",
        "align_corners=True)",
        (f"{POSITIONS}::test_square_grids_are_the_official_result_bit_for_bit",),
    ),
    Bug(
        "positions-of-an-unknown-grid-interpolated",
        "beit3_fast/checkpoint/load.py",
        "if rows == wanted and (source is None or grid is None):",
        "if rows == wanted and (source or square) is None:",
        (f"{POSITIONS}::test_a_model_takes_its_own_weights_as_they_are",),
    ),
    Bug(
        "positions-of-a-stated-grid-taken-as-they-are",
        "beit3_fast/checkpoint/load.py",
        "if rows == wanted and (source is None or grid is None):",
        "if rows == wanted:",
        (f"{POSITIONS}::test_a_stated_grid_comes_before_the_square_of_as_many_patches",),
    ),
    Bug(
        "save-whole-memory-behind-a-view",
        "beit3_fast/checkpoint/save.py",
        "tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes",
        "tensor.is_contiguous()",
        (f"{SAVE}::test_every_bit_comes_back",),
    ),
    Bug(
        "atomic-name-before-the-data",
        "beit3_fast/checkpoint/atomic.py",
        "os.fsync(file.fileno())\n                os.replace(partial, target)",
        "os.replace(partial, target)\n                os.fsync(file.fileno())",
        (f"{ATOMIC_SAVE}::test_data_reaches_the_disk_before_the_name",),
    ),
    Bug(
        "safetensors-digest-not-compared",
        "beit3_fast/checkpoint/safetensors_file.py",
        'if verify and claimed and digest.hexdigest() != claimed["sha256"]:',
        'if verify and claimed and not claimed["sha256"]:',
        (f"{MALFORMED}::test_a_malformed_file_is_refused", f"{FUZZ}::test_random_damage"),
    ),
    Bug(
        "pickle-any-name-of-torch",
        "beit3_fast/checkpoint/pickle_scan.py",
        "if name not in ALLOWED:",
        'if name not in ALLOWED and not name.startswith("torch."):',
        (f"{MALFORMED}::test_no_gadget_runs", f"{MALFORMED}::test_a_malformed_file_is_refused"),
    ),
    Bug(
        "safetensors-that-overlap",
        "beit3_fast/checkpoint/safetensors_file.py",
        "if begin != position:",
        "if begin > position:",
        (f"{MALFORMED}::test_a_malformed_file_is_refused",),
    ),
    Bug(
        "read-one-block-under-many-names",
        "beit3_fast/checkpoint/read.py",
        "if total > _MAX_ALIASING * size:",
        "if False:",
        (f"{MALFORMED}::test_a_malformed_file_is_refused",),
    ),
    Bug(
        "pickle-arrays-of-any-size",
        "beit3_fast/checkpoint/pickle_scan.py",
        '"builtins.bytearray": ((), (bytes,)),',
        '"builtins.bytearray": ((), (bytes,), (int,)),',
        (f"{MALFORMED}::test_a_malformed_file_is_refused",),
    ),
    Bug(
        "pickle-any-copies",
        "beit3_fast/checkpoint/pickle_scan.py",
        "if self.result.copied > MAX_COPIED:",
        "if False:",
        (f"{MALFORMED}::test_a_malformed_file_is_refused",),
    ),
    Bug(
        "pickle-sets-of-anything",
        "beit3_fast/checkpoint/pickle_scan.py",
        'for item in arguments[0] if name == "builtins.set" else ():',
        "for item in ():",
        (f"{MALFORMED}::test_a_malformed_file_is_refused",),
    ),
    Bug(
        "pickle-tensor-one-number-beyond-its-storage",
        "beit3_fast/checkpoint/pickle_scan.py",
        "(last + 1) * width > available",
        "last * width > available",
        (f"{MALFORMED}::test_a_malformed_file_is_refused",),
    ),
    # data
    Bug(
        "tokenizer-special-pieces-keep-their-numbers",
        "beit3_fast/data/tokenizer.py",
        "_ID_OF_SPECIAL = (UNK, BOS, EOS)",
        "_ID_OF_SPECIAL = (BOS, PAD, EOS)",
        ("tests/data/test_tokenizer.py::TestIds",),
    ),
    Bug(
        "tokenizer-two-more-tokens-before-the-log-says-cut",
        "beit3_fast/data/tokenizer.py",
        "len(tokens) > max_length - 2",
        "len(tokens) > max_length",
        ("tests/data/test_tokenizer.py::TestSegments",),
    ),
    Bug(
        "tokenizer-first-padding-not-marked",
        "beit3_fast/data/tokenizer.py",
        "torch.arange(width) >= torch.tensor(lengths)[:, None]",
        "torch.arange(width) > torch.tensor(lengths)[:, None]",
        ("tests/data/test_tokenizer.py::TestSegments",),
    ),
    Bug(
        "images-channels-in-bgr",
        "beit3_fast/data/presets.py",
        "mean=(0.485, 0.456, 0.406)",
        "mean=(0.406, 0.456, 0.485)",
        ("tests/data/test_images.py::TestPresets",),
    ),
    Bug(
        "processor-reserved-positions-counted",
        "beit3_fast/data/processor.py",
        "positions = config.max_text_positions - _RESERVED_POSITIONS",
        "positions = config.max_text_positions",
        ("tests/data/test_processor.py::TestForModel",),
    ),
    Bug(
        "load-left-half-done-by-a-hook",
        "beit3_fast/checkpoint/load.py",
        "        _put_back(model, before)\n",
        "",
        (
            "tests/checkpoint/test_load_all_or_nothing.py::test_a_model_whose_hook_fails_stays_as_it_was",
        ),
    ),
    Bug(
        "load-of-weights-for-another-number-of-heads",
        "beit3_fast/checkpoint/load.py",
        '_SHAPELESS = ("num_heads", "layer_norm_eps")',
        '_SHAPELESS = ("layer_norm_eps",)',
        ("tests/checkpoint/test_load_checkpoint.py::test_a_configuration_that_no_shape_shows",),
    ),
    Bug(
        "load-tied-weights-of-two-values",
        "beit3_fast/checkpoint/load.py",
        "    _check_ties(report, ready, targets)\n",
        "",
        ("tests/checkpoint/test_load_all_or_nothing.py::test_tied_weights_have_one_value",),
    ),
    Bug(
        "load-interrupted-half-way",
        "beit3_fast/checkpoint/load.py",
        "            model.load_state_dict(ready, strict=False)\n        raise\n",
        "            pass\n        raise\n",
        (
            "tests/checkpoint/test_load_all_or_nothing.py::test_an_interrupted_load_is_finished_first",
        ),
    ),
    Bug(
        "read-a-preset-that-is-none",
        "beit3_fast/checkpoint/read.py",
        "        ImagePreset.get(preset)\n",
        "        preset\n",
        (
            "tests/checkpoint/test_malformed_files.py::test_a_malformed_file_is_refused",
            "tests/checkpoint/test_save_checkpoint.py::test_what_the_reader_would_refuse_is_not_written",
        ),
    ),
)
