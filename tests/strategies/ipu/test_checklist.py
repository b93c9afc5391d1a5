"""lightning-graphcore's 33 tests as a checklist: where each behaviour is tested here, or why not.

Source: Lightning-AI/lightning-Graphcore 264afac, tests/test_accelerator.py.
"""

import ast
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TESTED = {
    "auto_device_count": "test_devices_are_ipus",
    "fail_if_no_ipus": "test_a_machine_without_the_ipus_of_the_plan_is_refused",
    "accelerator_selected": "test_the_accelerator_and_the_strategy_are_there_by_name",
    "no_warning_strategy": "test_fit_validate_and_fit_again",  # warnings are errors here
    "all_stages": "test_every_stage_of_a_trainer_runs",
    "inference_only": "test_every_stage_of_a_trainer_runs",
    "optimization": "test_the_debug_config_trains_saves_validates_predicts_and_exports",
    "half_precision": "test_other_precisions_are_refused",
    "pure_half_precision": "test_half_precision_trains_in_half_and_comes_close",
    "true_half_precision": "test_inputs_are_cast_on_the_host_if_they_are_floats",
    "device_iterations_ipu_strategy": "test_device_iterations_are_counted_as_updates",
    "accumulated_batches": "test_the_calls_for_training_on_a_pod16",
    "stages_correct": "test_each_stage_gives_its_own_values",
    "clip_gradients_fails": "test_fit_refuses",
    "autoreport": "test_a_folder_for_profiles_is_named_while_the_run_lasts",
    "manual_poptorch_dataloader": "test_poptorchs_own_loader_and_what_is_none_are_left_alone",
    "manual_poptorch_opts": "test_options_can_be_edited_before_they_are_used",
    "manual_poptorch_opts_custom": "test_loaders_have_the_options_of_their_graph",
    "replication_factor": "test_pod16_is_the_tutorials_recipe",
    "default_opts": "test_what_is_asked_for_by_option",
    "multi_optimizers_fails": "test_fit_refuses",
    "precision_plugin": "test_half_precision_trains_in_half_and_comes_close",
    "accelerator_ipu": "test_devices_are_ipus",
    "accelerator_ipu_with_devices": "test_devices_are_ipus",
    "strategy_choice_ipu_strategy": "test_the_strategy_alone_means_ipus",
    "device_type_when_ipu_strategy_passed": "test_the_strategy_alone_means_ipus",
    "poptorch_models_at_different_stages": "test_programs_take_turns_on_too_few_ipus",
    "raise_exception_with_batch_transfer_hooks": "test_transfer_hooks_run_on_the_host",
    "unsupported_ipu_choice": "test_other_precisions_are_refused",
    "num_stepping_batches_with_ipu": "test_the_length_of_a_schedule_counts_updates",
}
NOT_SUPPORTED = {
    "warning_if_ipus_not_used": "Lightning's own warning, gone with its IPU code in 2.3",
    "accelerator_auto_with_devices_ipu": "Lightning's list for accelerator='auto' is closed",
    "devices_auto_choice_ipu": "Lightning's list for accelerator='auto' is closed",
}


def test_all_33_are_accounted_for():
    assert len(TESTED) + len(NOT_SUPPORTED) == 33
    assert not set(TESTED) & set(NOT_SUPPORTED)


@pytest.mark.parametrize("theirs", TESTED)
def test_what_is_named_here_is_a_test(theirs):
    names = {
        node.name
        for path in HERE.glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text("utf8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert TESTED[theirs] in names
