"""The notebooks: their form without running them, then a smoke run of each.

The smoke runs assert what must hold scientifically (`INVARIANTS`), never pixels or exact numbers.
"""

import collections
import functools
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest

from fmlib import runs

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
PROFILES = ("smoke", "default", "paper")
SCREEN = 40  # lines of a cell; what is longer belongs into the package

Values = dict[str, float]


def of(metrics: Values, start: str, *, random: bool | None = None) -> list[float]:
    """Values of the metrics with this beginning; of trained or random encoders only, if asked."""
    return [
        value
        for name, value in metrics.items()
        if name.startswith(start) and random in (None, "_random_" in name)
    ]


def below(lower: list[float], upper: list[float]) -> bool:
    """Each lower value, of which there are some, is below its upper one."""
    return bool(lower) and all(x < y for x, y in zip(lower, upper, strict=True))


INVARIANTS: dict[str, dict[str, Callable[[Values], bool]]] = {
    # notebook: {what must hold: metrics -> whether it does}
    "00_tour": {
        "a probability is one": lambda m: 0 < m["top1_probability"] < 1,
        "a share is one": lambda m: all(0 < x <= 1 for x in of(m, "three_components_")),
        "a one-pixel shift changes every map": lambda m: min(of(m, "shift_map_")) > 0,
        "the mean over a map keeps less of a shift than the map": lambda m: below(
            of(m, "shift_mean_"), of(m, "shift_map_")
        ),
        "the highest is highest": lambda m: m["shift_map_highest"] >= m["shift_map_deep"],
        "a linear map beats doing nothing": lambda m: (
            m["error_grey_ridge"] < m["error_grey_nothing"]
            and m["error_mirror_ridge"] < m["error_mirror_nothing"]
        ),
        "and mirroring the grid alone": lambda m: (
            m["error_mirror_ridge"] < m["error_mirror_grid_only"] < m["error_mirror_nothing"]
        ),
        "and the mean feature": lambda m: max(m["error_grey_ridge"], m["error_mirror_ridge"]) < 1,
    },
    "10_shift_maps": {
        "cosines of non-negative features are in [0, 1]": lambda m: all(
            0 < x < 1 for x in of(m, "global_cosine_") + of(m, "centre_cosine_")
        ),
        "the centre is nearer to the rest than a corner": lambda m: below(
            of(m, "global_cosine_"), of(m, "centre_cosine_")
        ),
        "a pixel changes less than the way to a corner": lambda m: below(
            of(m, "near_drop_"), of(m, "drop_")
        ),
        "a way is no shorter than its ends are apart": lambda m: (
            min(of(m, "roughness_")) > 1 - 1e-9
        ),
        "to random weights objects look alike": lambda m: (
            min(of(m, "between_", random=True)) > max(of(m, "between_", random=False))
        ),
        "training makes cosines fall": lambda m: (
            max(of(m, "drop_", random=True)) < min(of(m, "drop_", random=False))
        ),
        "less so on the scale of other objects": lambda m: (
            max(of(m, "displacement_", random=False)) < min(of(m, "displacement_", random=True))
        ),
        "for small objects as for large ones": lambda m: all(
            max(of(m, name, random=False)) < min(of(m, name, random=True))
            for name in ("large_displacement_", "small_displacement_")
        ),
        "a share of variance is one": lambda m: 0 <= m["class_share"] <= 1,
    },
    "11_position_probe": {
        "accuracies are shares": lambda m: all(
            0 <= value <= 1
            for name, value in m.items()
            if "accuracy" in name and not name.endswith("over_control")
        ),
        "a mean colour tells nothing": lambda m: m["floor_accuracy"] == 0.5,
        "deep features of trained networks tell the half": lambda m: (
            m["position_accuracy_efficientnet_lite0"] > 0.7
            and m["position_accuracy_squeezenet1_1"] > 0.7
        ),
        "and the place, better than not knowing": lambda m: (
            max(of(m, "position_error_px_", random=False)) < m["position_floor_px"]
        ),
        "a mean R² is no more than the mean error allows": lambda m: all(
            m[name.replace("error_px", "r2")] <= 1 - (error / m["position_floor_px"]) ** 2 + 1e-9
            for name, error in m.items()
            if name.startswith("position_error_px_")
        ),
        "random folds credit smooth noise more than strips do": lambda m: (
            m["noise_accuracy_shuffled"] > m["noise_accuracy_blocked"]
        ),
    },
    "12_shift_spectrum": {
        "harmonics stand out": lambda m: min(of(m, "alias_over_background_", random=False)) > 1,
        "nothing below the layer's own frequency": lambda m: (
            m["misplaced_efficientnet_lite0"] < 1e-3
        ),
        "both errors are there": lambda m: min(of(m, "alias_power_") + of(m, "drift_")) > 0,
        "a share is one": lambda m: all(0 <= x < 1 for x in of(m, "local_share_")),
        "inside, whole strides are exact and others are not": lambda m: (
            max(of(m, "equivariance_whole_")) < 1e-4 < 0.05 < min(of(m, "equivariance_error_"))
        ),
        "at the border not even whole strides": lambda m: min(of(m, "border_error_")) > 0.01,
    },
    "14_real_shifts": {
        "a shorter shift changes less": lambda m: below(
            of(m, "window_pixel_"), of(m, "window_far_")
        ),
        "half a pixel less than a whole one": lambda m: (
            min(of(m, "half_share_")) > 0 and max(of(m, "half_share_")) < 1
        ),
        "unless the picture rings": lambda m: m["sharp_half"] > 1,
        "on white, multiples of the stride undo part of the change": lambda m: (
            min(of(m, "undone_white_")) > 0.1 and max(of(m, "undone_white_")) < 1
        ),
        "and more than where an object moves in a scene": lambda m: below(
            of(m, "undone_photograph_"), of(m, "undone_white_")
        ),
        "on white, the border is seen": lambda m: m["border_white_efficientnet_lite0"] > 0,
        "a scene makes place matter more": lambda m: m["displacement_photograph_over_white"] > 0,
        "training makes windows more alike": lambda m: m["window_over_control"] < 0,
    },
    "15_shift_explorer": {
        "no pair is closer than itself, the least is below the mean": lambda m: (
            below(of(m, "least_pair_"), of(m, "pairs_cosine_")) and max(of(m, "pairs_cosine_")) < 1
        ),
        "corners are the least typical references": lambda m: (
            max(of(m, "corner_bias_", random=False)) < 0
        ),
        "to random weights positions look alike": lambda m: (
            min(of(m, "pairs_cosine_", random=True)) > max(of(m, "pairs_cosine_", random=False))
        ),
    },
    "20_edits": {
        "saving again moves features least": lambda m: (
            m["moved_jpeg_95_squeezenet1_1"] == min(of(m, "moved_", random=False))
        ),
        "a quarter turn moves them most": lambda m: (
            m["moved_rotation_90_squeezenet1_1"] == max(of(m, "moved_", random=False))
        ),
        "a share is at most one": lambda m: max(of(m, "common_")) <= 1,
        "what is outside an object moves less, but it moves": lambda m: all(
            0 < x < 1 for x in of(m, "spread_")
        ),
    },
    "21_linear_maps": {
        "a gain is at most one": lambda m: max(of(m, "gain_")) <= 1,
        "the weakest edit is below the mean": lambda m: (
            m["weakest_squeezenet1_1"] <= m["mean_gain_squeezenet1_1"]
        ),
        "grey is learnt": lambda m: m["gain_greyscale_1_squeezenet1_1"] > 0,
        "photographs are fitted or held out": lambda m: m["fitted_on"] + m["held_out"] == 10,
    },
    "22_map_families": {
        "no map is above the ceiling": lambda m: all(
            max(value for name, value in m.items() if re.match(rf"r2_.*_{edit}", name))
            < min(of(m, f"ceiling_{edit}"))
            for edit in ("greyscale", "rotation_90", "mask_big_center")
        ),
        "each closed form beats the one it contains": lambda m: (
            min(of(m, "step_procrustes_") + of(m, "step_ridge_")) > 0
        ),
        "ridge beats every floor": lambda m: all(
            m[f"floor_{edit}_efficientnet_lite0"] < m[f"r2_ridge_{edit}_efficientnet_lite0"]
            for edit in ("greyscale", "rotation_90", "mask_big_center")
        ),
        "nothing is better than the best": lambda m: (
            0 <= m["ridge_gap_mean_efficientnet_lite0"] <= m["ridge_gap_worst_efficientnet_lite0"]
        ),
        "the blind do not learn to turn": lambda m: max(of(m, "learned_geometry_")) < 0.5,
    },
    "23_rank_and_spectrum": {
        "a rank is at most the number of channels": lambda m: max(of(m, "rank_")) <= 384,
        "a change has fewer dimensions than channels": lambda m: (
            max(of(m, "effective_rank_")) < 384
        ),
        "a ratio of ranks is one": lambda m: m["meaning_over_error_squeezenet1_1"] > 0,
    },
    "24_edit_algebra": {
        "products keep most of the direct gain": lambda m: (
            min(of(m, "kept_shallow_") + of(m, "kept_deep_", random=False)) > 0.5
        ),
        "sums of changes keep less": lambda m: (
            max(of(m, "kept_by_sum_", random=False))
            < min(of(m, "kept_shallow_") + of(m, "kept_deep_", random=False))
        ),
        "no inverse does better than the way back fitted": lambda m: (
            min(of(m, "transpose_loses_") + of(m, "pseudo_inverse_loses_")) > -0.02
        ),
        "a transpose loses less than a pseudo-inverse": lambda m: (
            sum(of(m, "transpose_loses_")) < sum(of(m, "pseudo_inverse_loses_"))
        ),
        "lost colour comes back less than a turned hue": lambda m: m["hue_undone_less_grey"] > 0,
        "two mirrors are nearly none": lambda m: (
            min(of(m, "return_orthogonal_mirror_", random=False)) > 0.9
        ),
        "the square of a map is no better than the map of the half turn": lambda m: (
            min(of(m, "square_loses_")) > -0.01
        ),
        "powers extrapolate better than straight lines": lambda m: (
            min(of(m, "power_over_straight_line_stronger_")) > 0
        ),
    },
    "25_semantic_edits": {
        "a random direction errs twice as much as doing nothing": lambda m: all(
            -1.1 < x < -0.9 for x in of(m, "direction_")
        ),
        "no share is above one": lambda m: max(of(m, "learnt_") + of(m, "ladder_")) < 1,
        "the weakest is weakest": lambda m: (
            m["weakest_efficientnet_lite0"] <= m["strongest_efficientnet_lite0"]
        ),
        "inserting is a blend once object and place are known": lambda m: (
            m["ladder_insert_3_blend"]
            > max(m["ladder_insert_3_linear"], m["ladder_insert_0_blend"])
        ),
        "a part of the change is outside": lambda m: all(0 < x < 1 for x in of(m, "outside_")),
    },
    "26_transport": {
        "a stitching explains something, not all": lambda m: all(
            0 < x < 1 for x in of(m, "stitch_to_")
        ),
        "training is carried": lambda m: min(of(m, "gain_to_")) > 0,
        "a carried change does less than the own map": lambda m: all(
            0 < x < 1 for x in of(m, "index_to_")
        ),
        "an edit is best predicted by itself": lambda m: min(of(m, "lead_to_")) > 0,
    },
    "30_invert_descriptors": {
        "errors of means lie between meeting the code and another's": lambda m: all(
            0 < x < 1.2 for x in of(m, "error_")
        ),
        "squares of small errors are smaller": lambda m: all(
            m[f"squared_{name}"] < m[f"error_{name}"] for name in ("hog", "hogb", "dsift")
        ),
        "hard bins are matched worse": lambda m: m["hogb_less_hog"] < 0 < m["hog_over_hogb"] - 1,
        "likeness is one": lambda m: all(
            -1 < x <= 1 for x in of(m, "ssim_") + of(m, "correlation_")
        ),
    },
    "31_invert_layers": {
        "Adam ends lower than the published optimiser": lambda m: (
            bool(of(m, "objective_ratio_")) and max(of(m, "objective_ratio_")) < 1
        ),
        "a shallow code wants little prior": lambda m: m["gap_adam_shallow_squeezenet1_1"] > 0,
        "light, colour and likeness go with depth": lambda m: all(
            m[f"{name}_deep_squeezenet1_1"] < m[f"{name}_shallow_squeezenet1_1"]
            for name in ("luma", "chroma", "ssim")
        ),
        "and places": lambda m: (
            m["displacement_shallow_squeezenet1_1"] < m["displacement_deep_squeezenet1_1"]
        ),
        "a shallow pre-image is its own photograph's": lambda m: all(
            m[f"{name}_kept_shallow_squeezenet1_1"] > 0
            for name in ("luma", "chroma", "displacement", "ssim")
        ),
        "the network knows its pre-images": lambda m: m["recognised_deep_squeezenet1_1"] > 0,
        "shares are shares": lambda m: all(0 <= x <= 1 for x in of(m, "overtaken_")),
    },
    "32_invariances": {
        "deeper codes leave more open": lambda m: m["spread_growth"] > 0,
        "spreads are shares": lambda m: all(
            0 < m[name] < 1.3
            for name in m
            if name.startswith("spread_") and name != "spread_growth"
        ),
        "deeper layers notice fewer directions": lambda m: below(
            of(m, "noticed_features_7_"), of(m, "noticed_features_1_")
        ),
        "walks keep to the tolerance": lambda m: m["walk_worst_error"] <= 0.05 + 1e-6,
        "and change the code less than the straight way": lambda m: min(of(m, "walk_gain_")) > 1,
        "units use the middle of their field": lambda m: (
            m["field_edge_features_4"] < m["field_edge_features_1"] < 1
        ),
        "channels that notice blur hold finer detail": lambda m: (
            m["groups_frequency_by_blur_features_1"] > 0
        ),
    },
    "33_prior_zoo": {
        "no run breaks off": lambda m: m["failed"] == 0,
        "every prior fits a code better than another photograph does": lambda m: (
            max(of(m, "feature_middle_") + of(m, "feature_deep_")) < 1
        ),
        "noise of the start stays without a prior": lambda m: (
            m["natural_gradient"] < min(m["gradient_middle_none"], m["gradient_deep_none"])
        ),
        "and a grey start has less of it": lambda m: max(of(m, "grey_less_noise_gradient_")) < 0,
        "divergences are at most a bit": lambda m: all(
            0 <= x <= 1 for x in of(m, "judge_middle_") + of(m, "judge_deep_")
        ),
        "no prior is not the best image": lambda m: max(of(m, "none_less_finest_correlation_")) < 0,
    },
    "34_edited_codes": {
        "maps gain on features": lambda m: min(of(m, "gain_")) > 0,
        "codes of photographs are nearest to the range": lambda m: all(
            m[f"missed_{d}_real"] < min(m[f"missed_{d}_gaussian"], m[f"missed_{d}_scattered"])
            for d in ("shallow", "deep")
        ),
        "mixtures are harder than real codes": lambda m: (
            min(m["mixture_harder_shallow"], m["mixture_harder_deep"]) > 0
        ),
        "mapped codes give edited pictures": lambda m: min(of(m, "share_mapped_")) > 0.3,
        "a share of classes is one": lambda m: all(0 <= x <= 1 for x in of(m, "class_own_")),
    },
    "40_upconv_descriptors": {
        "errors are finite distances": lambda m: all(0 < x < 3 for x in of(m, "error_")),
        "an up-convolution is a transposed convolution": lambda m: (
            m["upconvolution_difference"] < 1e-9
        ),
        "HOG has no colour": lambda m: m["code_change_without_colour_hog"] < 0.02,
        "the mean beats one looked-up picture": lambda m: all(
            m["error_mean_image"] < m[f"nearest_{name}"] for name in ("hog", "lbp", "sift_grid")
        ),
        "HOG beats the mean image": lambda m: m["mean_less_learned_hog"] > 0,
    },
    "41_upconv_layers": {
        "shallow codes give the picture back": lambda m: all(
            m[f"over_{floor}_{layer}"] < 0
            for floor in ("mean", "neighbours")
            for layer in ("blocks_0_efficientnet_lite0", "features_1_squeezenet1_1")
        ),
        "deeper codes give less": lambda m: (
            min(m["rise_efficientnet_lite0"], m["rise_squeezenet1_1"]) > 0
        ),
        "and fewer bits": lambda m: (
            m["bits_blocks_0_efficientnet_lite0"]
            > m["bits_blocks_3_efficientnet_lite0"]
            > m["bits_logits_efficientnet_lite0"]
        ),
        "a code made for it gives more": lambda m: min(of(m, "bound_gap_")) > 0,
        "decoders win in image error": lambda m: m["image_gap_adam"] < 0,
        "light lies where it lay in a shallow code": lambda m: (
            m["explained_luma_blocks_0_efficientnet_lite0"] > 0.5
            and m["layout_kept_luma_blocks_0_efficientnet_lite0"] > 0.5
        ),
    },
    "42_code_perturbations": {
        "unchanged codes beat the mean image": lambda m: max(of(m, "unchanged_")) < m["mean_image"],
        "values at wrong places mislead more than no values": lambda m: below(
            of(m, "loss_binarise_"), of(m, "loss_moved_")
        ),
        "more bits, less loss": lambda m: below(of(m, "quantised_4_"), of(m, "quantised_1_")),
        "a sparse code's chimera is its pattern's": lambda m: (
            m["pattern_share_squeezenet1_1_features_12"] > 0
            and m["values_less_pattern_squeezenet1_1_features_12"] > 0
        ),
        "a pattern of two signs costs at most a bit": lambda m: all(
            0 < x <= 1 for x in of(m, "sign_bits_")
        ),
    },
    "43_probabilities": {
        "all digits beat the mean image": lambda m: m["gain_logits_over_mean_image"] > 0,
        "the five largest are not missed": lambda m: abs(m["rest_less_all_logits"]) < 0.03,
        "digits tell": lambda m: m["error_logits_round_12"] < m["error_logits_round_1"],
        "rates are shares": lambda m: all(
            0 <= x <= 1 for x in of(m, "identified_") + of(m, "pair_decoded_")
        ),
        "a file is its own fingerprint": lambda m: m["identified_same_file_all"] == 1,
        "and another crop is told beyond chance": lambda m: (
            m["identified_another_crop_all"] > 2 * m["chance"]
        ),
    },
    "44_image_prior": {
        "a shallow decoder beats the mean image": lambda m: m["gain_blocks_2"] > 0,
        "place and colour go with depth": lambda m: (
            m["place_logits"] < m["place_blocks_2"] and m["tint_logits"] < m["tint_blocks_2"]
        ),
        "a shallow picture moves with its photograph": lambda m: (
            0.9 < m["place_blocks_2"] < 1.1 and 0.9 < m["place_ceiling_photographs"] < 1.1
        ),
        "paths bend more in deep layers": lambda m: (
            0 < m["deviation_blocks_2"] < m["deviation_global_pool"]
        ),
        "a random code is shown less faithfully": lambda m: (
            m["code_error_unit_by_unit_less_real_blocks_2"] > 0
        ),
    },
    "45_hybrid": {
        "refinement matches the code better than the decoder": lambda m: (
            max(of(m, "hybrid_less_decoder_feature_")) < 0
        ),
        "and stays nearer to the photograph than from the mean picture": lambda m: (
            max(of(m, "hybrid_less_mean_image_")) < 0
        ),
        "mapped codes give edited pictures": lambda m: min(of(m, "share_mean_")) > 0,
        "shares of steps are shares": lambda m: all(0 <= x <= 1 for x in of(m, "steps_share_")),
        "edits reach the decoded picture": lambda m: min(of(m, "seen_")) > 0,
    },
    "50_filter_textures": {
        "a share is one": lambda m: all(
            0 <= x <= 1
            for start in ("share_shallow_", "share_deep_", "share_photograph_")
            for x in of(m, start)
        ),
        "a texture has more of its code in the filter than the photograph": lambda m: (
            m["share_deep_squeezenet1_1"] > m["share_photograph_deep"]
        ),
        "it is nearer to its target than no activation": lambda m: (
            max(of(m, "error_shallow_") + of(m, "error_deep_")) < 1.01
        ),
        "there is at least one colour": lambda m: (
            min(of(m, "colours_shallow_") + of(m, "colours_deep_")) >= 1
        ),
        "entropies are at most that of all orientations": lambda m: all(
            0 <= x <= math.log2(18)
            for start in ("orientation_shallow_", "orientation_deep_")
            for x in of(m, start)
        ),
        "a filter's textures are nearer to one another": lambda m: (
            m["gram_within_squeezenet1_1"] < m["gram_between_squeezenet1_1"]
        ),
    },
    "51_identifiability": {
        "a shallow texture finds its filter": lambda m: m["map_features_1"] > 2 * m["chance"],
        "it is the filter that is found, not the photograph": lambda m: (
            m["filter_less_photo_all"] > 0
        ),
        "a filter's textures lie nearer than others": lambda m: (
            m["within"] < m["between"] and m["ratio_all"] > 1
        ),
        "another start moves less than another filter": lambda m: m["again"] < m["between"],
        "shares are shares": lambda m: all(
            0 <= x <= 1 for x in of(m, "identified_") + of(m, "dead_") + of(m, "leak_")
        ),
    },
    "52_energy": {
        "the published gradient is that of the linear kernel": lambda m: m["identity_error"] < 1e-9,
        "published shares are far from shares of a whole": lambda m: m["gross_shallow"] > 2,
        "a photograph is its own content, a style its own style": lambda m: (
            abs(m["contours_of_photograph"] - 1) < 1e-6
            and abs(m["gain_of_style_picture"] - 1) < 1e-6
            and m["changed_of_photograph"] < 1e-6
        ),
        "published codes are missed by more than unchanged ones": lambda m: (
            m["reach_error_published_features_4"] > m["reach_error_unchanged_features_4"]
        ),
        "energies of a style picture are reached better than shuffled ones": lambda m: (
            m["reach_sums_over_shuffled"] > 0
        ),
        "colours cost no contours": lambda m: m["contours_plain"] > 0.9,
    },
    "53_gram": {
        "the style loss is an MMD": lambda m: m["mmd_deviation"] < 1e-3,
        "a covariance is shorter than its Gram matrix": lambda m: (
            min(of(m, "covariance_share_")) > 0 and max(of(m, "covariance_share_")) < 1
        ),
        "another window is nearer than another texture": lambda m: max(of(m, "retest_")) < 1,
        "statistics that are matched come nearer": lambda m: max(m["own_means"], m["own_gram"]) < 1,
        "paired differences are differences": lambda m: (
            abs(m["error_gram_gram"] - m["error_means_gram"] - m["gram_less_means_gram"]) < 1e-9
        ),
    },
    "54_texture_basis": {
        "parts learned from photographs are purer than filters": lambda m: (
            m["purity_nmf_less_filters"] > 0
        ),
        "a texture has more of its direction than photographs have": lambda m: (
            min(m["purity_times_filters"], m["purity_times_nmf"]) > 1
        ),
        "pure filters would explain the diagonal only": lambda m: (
            m["gram_share_pure_filters"]
            < min(m["gram_share_pure_nmf"], m["gram_share_filters"], 0.5)
        ),
        "channel energies are easier than Gram matrices": lambda m: all(
            m[f"energy_share_{f}"] > m[f"gram_share_{f}"]
            for f in ("filters", "nmf", "photographs", "mean")
        ),
        "photographs are better primitives than filters": lambda m: (
            m["gram_photographs_less_filters"] > 0 and m["energy_photographs_less_filters"] > 0
        ),
    },
    "90_explore_shifts": {
        "the least pair is below the mean": lambda m: 0 < m["least_pair"] < m["pairs_cosine"] < 1,
    },
    "91_explore_inversion": {
        "the code is nearer than noise's": lambda m: (
            0 < m["relative_error"] < m["start_error"] and -1 < m["likeness"] < 1
        ),
    },
    "13_antialiasing": {
        "a network names what it names": lambda m: m["agreement_squeezenet1_1_original"] == 1,
        "blurring calms features near by": lambda m: m["local_ratio_squeezenet1_1"] < 0.8,
        "and takes power from the harmonics": lambda m: (
            m["alias_squeezenet1_1_tri3"] < 0.7 * m["alias_squeezenet1_1_original"]
        ),
        "but makes them no more invariant far away": lambda m: (
            m["global_change_squeezenet1_1"] > -0.05
        ),
        "on one colour a circular network cannot tell places": lambda m: (
            max(m["wiggle_squeezenet1_1_polyphase"], m["displacement_squeezenet1_1_polyphase"])
            < 1e-6
        ),
        "nor flip under circular shifts": lambda m: (
            m["circular_consistency_squeezenet1_1_polyphase"] == 1
        ),
    },
    "92_explore_decoder": {
        "the code helps, and changing it harms": lambda m: (
            0 < m["error_plain"] < min(m["error_changed"], m["error_mean_image"])
        ),
    },
    "93_explore_texture": {
        "filters gain energy in their textures": lambda m: (
            0 <= m["filter_share_picture"] < m["filter_share_texture"] < 1
        ),
        "either end of the mixtures is nearer to its own photograph": lambda m: (
            m["first_end_to_first"] < m["first_end_to_second"]
            and m["last_end_to_second"] < m["last_end_to_first"]
        ),
        "reallocated codes come nearer": lambda m: (
            0 < m["reallocation_error"] < m["reallocation_start"]
        ),
    },
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@functools.cache
def read(path: Path) -> Any:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


def codes(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def figure_faults(cell: Any) -> list[str]:
    """What a figure's cell lacks: caption, name to refer to it by, alternative text."""
    wanted = {"figure": ("caption", "name"), "image": ("alt",)}
    given = cell.metadata.get("mystnb", {})
    return [
        f"mystnb.{part}.{key}"
        for part, keys in wanted.items()
        for key in keys
        if not str(given.get(part, {}).get(key, "")).strip()
    ]


# -------------------------------------------------------------------------------------- the form


def test_there_are_notebooks_and_each_has_its_profiles() -> None:
    table = runs.profiles(FOLDER / "profiles.yml")
    assert sorted(table) == [path.stem for path in NOTEBOOKS]
    assert NOTEBOOKS
    for stem, entry in table.items():
        assert set(entry) == set(PROFILES), stem


@each_notebook
def test_is_clean(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    ids = [cell.id for cell in notebook.cells]
    assert len(set(ids)) == len(ids)
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    for cell in codes(notebook):
        assert cell.outputs == [], cell.source
        assert cell.execution_count is None, cell.source


@each_notebook
def test_parameters_are_annotated_and_described(path: Path) -> None:
    import papermill

    table = runs.parameters(path).set_index("name")
    assert len(table), "no cell tagged 'parameters'"
    assert "" not in table["description"].tolist()
    assert table.loc["seed", "type"] == "int"
    assert table.loc["device", ["type", "default"]].tolist() == ["str", "auto"]
    # what plain papermill reads, and shows by --help-notebook, is the same
    seen = papermill.inspect_notebook(path)
    assert {name: entry["inferred_type_name"] for name, entry in seen.items()} == dict(
        table["type"]
    )


@each_notebook
@pytest.mark.parametrize("profile", PROFILES)
def test_profile_fits_the_parameters(path: Path, profile: str) -> None:
    assert runs.merge(path, profile=profile)


@each_notebook
def test_reads_as_a_chapter(path: Path) -> None:
    notebook = read(path)
    first = notebook.cells[0]
    assert first.cell_type == "markdown"
    assert re.match(r"# \S", first.source)
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    unfenced = re.sub(r"(?ms)^(```+|~~~+).*?^\1", "", "\n\n".join(prose))
    assert len(re.findall(r"(?m)^# ", unfenced)) == 1
    assert codes(notebook)[-1].source.strip().endswith("runs.finish()")
    for cell in codes(notebook):
        lines = cell.source.splitlines()
        assert len(lines) <= SCREEN, cell.source
        assert not any(re.match(r"\s*(!|%pip|%conda)", line) for line in lines), cell.source


@each_notebook
def test_figures_have_caption_name_and_alternative_text(path: Path) -> None:
    for cell in codes(read(path)):
        if "mystnb" in cell.metadata or "plots.show(" in cell.source:
            assert figure_faults(cell) == [], cell.source


def test_figure_names_are_unique() -> None:
    cells = [cell for path in NOTEBOOKS for cell in codes(read(path))]
    figures = [cell.metadata.get("mystnb", {}).get("figure", {}) for cell in cells]
    names = [figure["name"] for figure in figures if "name" in figure]
    assert len(set(names)) == len(names)


# ------------------------------------------------------------------------------------ smoke runs


@pytest.fixture(scope="session")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """What starts a kernel for a smoke run: a fork of one that has done the imports."""
    folder = tmp_path_factory.mktemp("kernels")
    script = Path(__file__).with_name("warm_kernels.py")
    path = os.path.relpath(folder / "socket") if len(str(folder)) > 80 else str(folder / "socket")
    environment = os.environ | runs._kernel_environment(folder)
    with subprocess.Popen([sys.executable, script, "serve", path], env=environment) as server:
        deadline = time.monotonic() + 300
        while not Path(path).exists() and time.monotonic() < deadline and server.poll() is None:
            time.sleep(0.1)
        assert Path(path).exists()
        yield (sys.executable, str(script), "start", path)
        server.kill()


@pytest.fixture(scope="session")
def smoke(
    tmp_path_factory: pytest.TempPathFactory, launcher: tuple[str, ...]
) -> Callable[[Path], runs.RunResult]:
    """The result of a notebook's smoke run, which happens once."""
    folder = tmp_path_factory.mktemp("smoke")

    @functools.cache
    def result(path: Path) -> runs.RunResult:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runs, "_LAUNCHER", launcher)
            return runs.run(path, profile="smoke", directory=folder / path.stem)

    return result


def values(metrics: dict[str, dict[str, Any]]) -> Values:
    return {name: record["value"] for name, record in metrics.items()}


@each_notebook
def test_smoke_run_is_whole(path: Path, smoke: Callable[[Path], runs.RunResult]) -> None:
    result = smoke(path)
    assert result.metrics
    assert all(math.isfinite(value) for value in values(result.metrics).values())
    asked = {"encoder", "encoders"} & set(result.manifest["parameters"])
    assert bool(result.manifest["encoders"]) or not asked  # hand-made descriptors have no weights
    for cell in codes(nbformat.read(result.notebook, as_version=4)):
        kinds = {kind for output in cell.outputs for kind in output.get("data", {})}
        if kinds & {"image/png", "image/svg+xml", "image/jpeg"}:
            assert figure_faults(cell) == [], cell.source
        noise = [o.text for o in cell.outputs if o.output_type == "stream" and o.name == "stderr"]
        assert noise == [], cell.source
    glued = collections.Counter(
        output.metadata["scrapbook"]["name"]
        for cell in codes(nbformat.read(result.notebook, as_version=4))
        for output in cell.outputs
        if "scrapbook" in output.get("metadata", {})
    )
    assert [name for name, times in glued.items() if times > 1] == [], "glued twice"


@each_notebook
def test_smoke_run_holds_scientifically(
    path: Path, smoke: Callable[[Path], runs.RunResult]
) -> None:
    found = values(smoke(path).metrics)
    assert INVARIANTS.get(path.stem), "no invariants to test"
    broken = [what for what, holds in INVARIANTS[path.stem].items() if not holds(found)]
    assert broken == [], json.dumps(found, indent=2)


@pytest.mark.parametrize("path", NOTEBOOKS[:1], ids=lambda path: path.stem)
def test_plain_papermill_gives_bit_identical_metrics(
    path: Path, smoke: Callable[[Path], runs.RunResult], tmp_path: Path
) -> None:
    """As a reader without our runner has it; from the notebook's folder, as JupyterLab does."""
    expected = smoke(path).metrics
    command = [sys.executable, "-m", "papermill", path.name, str(tmp_path / "out.ipynb")]
    (tmp_path / "values.json").write_text(json.dumps(runs.merge(path, profile="smoke")))
    command += ["--parameters_file", str(tmp_path / "values.json"), "--no-progress-bar"]
    subprocess.run(command, cwd=path.parent, check=True, capture_output=True, timeout=300)
    assert runs.harvest(tmp_path / "out.ipynb") == expected


@pytest.mark.parametrize("path", NOTEBOOKS[:1], ids=lambda path: path.stem)
def test_thread_count_does_not_matter(
    path: Path,
    smoke: Callable[[Path], runs.RunResult],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = smoke(path)
    other = 2 if one.manifest["threads"] == 1 else 1
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", str(other))
    two = runs.run(path, profile="smoke", directory=tmp_path / "other")
    assert two.manifest["threads"] == other
    # a spectrum's background lies next to the rounding of single precision
    assert values(two.metrics) == pytest.approx(values(one.metrics), rel=1e-4, abs=1e-5)
