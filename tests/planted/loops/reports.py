"""Which report each planted bug is after, and what is to be refuted of it."""

from planted.loops import (
    Bug,
    dead,
    leaks,
    moved_by_the_optimizer,
    moved_by_the_step,
    not_the_mask_that_was_meant,
    rates,
    statistics,
    wasted,
)


def _bugs(module, *rows):
    return tuple(
        Bug(getattr(module, name).__doc__.partition(": ")[0], getattr(module, name), claims) for name, *claims in rows
    )


BUGS = (
    *_bugs(
        moved_by_the_optimizer,
        ("masked_passes_gradients_through", ("frozen", "backbone/kernel"), ("frozen", "backbone/bias")),
        ("optimizer_was_given_all_parameters", ("frozen", "extractor/dense/kernel")),
        ("decay_after_zeroed_gradients", ("frozen", "body/weight"), ("frozen", "body/bias")),
        ("decay_moves_masked_elements", ("frozen", "backbone/kernel"), ("frozen", "head/kernel")),
        ("momentum_moves_pruned_elements", ("frozen", "backbone/kernel"), ("frozen", "head/kernel")),
        ("moments_left_over", ("frozen", "extractor/dense/kernel"), ("frozen", "extractor/dense/bias")),
        ("decay_outside_of_multi_steps", ("frozen", "backbone/kernel"), ("frozen", "backbone/bias")),
        ("in_two_groups", ("frozen", "backbone/kernel")),
        ("optimizer_created_anew_each_epoch", ("frozen", "backbone/kernel"), ("frozen", "backbone/bias")),
    ),
    *_bugs(
        moved_by_the_step,
        ("new_rows_in_one_of_two_tables", ("frozen", "head")),
        ("tied_tables", ("frozen", "embed")),
        ("through_half_precision", ("frozen", "backbone/kernel"), ("frozen", "backbone/bias")),
        ("quantised_anew", ("frozen", "base/codes"), ("frozen", "base/scale")),
        ("trains_on_from_the_average", ("frozen", "backbone/kernel"), ("frozen", "backbone/bias")),
    ),
    *_bugs(
        not_the_mask_that_was_meant,
        ("filter_misses_a_tower", ("frozen", "img/dense/kernel"), ("frozen", "img/dense/bias")),
        ("names_that_match_nothing", ("frozen", "encoder/data/kernel"), ("frozen", "encoder/data/bias")),
        ("mask_of_the_first_trace", ("frozen", "backbone/kernel"), ("frozen", "backbone/bias")),
        ("frozen_again_by_a_resume", ("trains", "encoder/data/kernel"), ("trains", "encoder/data/bias")),
        ("layers_of_the_first_draw", ("trains", "blocks/kernel")),
        ("layers_that_came_later", ("trains", "backbone_pruned/kernel"), ("trains", "backbone_pruned/bias")),
    ),
    *_bugs(
        statistics,
        ("statistics_drift", ("frozen", "norm/mean"), ("frozen", "norm/var")),
        ("frozen_norm_in_train_mode", ("frozen", "norm/mean"), ("frozen", "norm/var")),
    ),
    *_bugs(
        leaks,
        ("clip_norm_over_frozen_gradients", ("unseen", "backbone/kernel"), ("unseen", "backbone/bias")),
        ("spikes_of_frozen_gradients", ("unseen", "backbone/kernel"), ("unseen", "backbone/bias")),
        ("norm_of_accumulated_gradients", ("unseen", "backbone/kernel"), ("unseen", "backbone/bias")),
    ),
    *_bugs(
        dead,
        ("checkpoint_cuts_the_adapters", ("trains", "block/a"), ("trains", "block/b")),
        ("extractor_detaches", ("trains", "image/dense/weight"), ("trains", "image/dense/bias")),
        ("both_factors_zero", ("trains", "lora/a"), ("trains", "lora/b")),
        ("average_by_other_names", ("trains", "head.kernel"), ("trains", "head.bias")),
    ),
    *_bugs(
        rates,
        ("unread_scales", ("rate", "backbone/kernel"), ("rate", "backbone/bias")),
        ("scale_before_adam", ("rate", "backbone/kernel"), ("rate", "backbone/bias")),
        ("one_layer_too_deep", ("rate", "backbone/kernel"), ("rate", "backbone/bias")),
    ),
    *_bugs(
        wasted,
        ("the_same_dropout", ("idle", "dropout_key")),
        ("moments_of_the_base", ("state", "base/kernel")),
    ),
)
