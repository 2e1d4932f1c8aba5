// What a block is to native code, and its state: mixer_step and mixer_prefill share it.
//
// Legend: M rows of the batch, D d_model, E d_inner, K conv width, N d_state, G groups, R dt_rank, H heads.
#pragma once

#include "native.h"

namespace mc {

// A linear as its module holds it: see Linear in int_tiles.h and Weights in linear_tasks.h.
struct Matrix {
    int64_t weights, inputs, outputs, groups, activation, act_bits, scale_dtype, tiled, keep, of;
    const void *weight, *scale;
    const uint8_t* zero;
    const float *bias, *act_scale;
};

// An online rotation: see Hadamard in hadamard_rows.h. block 0: none.
struct Rotation {
    int64_t block, base;
    const float* mix;
    const int8_t* signs;
};

struct Block {
    int64_t ssd;  // 0: Mamba-1 (in_proj rows [x, z]), 1: Mamba-2 (in_proj rows [z, x, B, C, dt])
    int64_t size, channels, states, groups, width, activated, rank, heads;  // D, E, N, G, K, the convolution's activation, R, H
    int64_t inner_norm;         // Mamba-1: norms without a weight on dt, B and C
    double norm_eps, inner_eps;  // inner: of these norms, or of Mamba-2's gated norm
    double dt_low, dt_high;
    const float* norm;                            // [D], or null: the input is normed already, and no residual is added
    const float *conv, *conv_bias, *conv_scale;   // [channels, K], [channels] or null
    const float *decay, *D, *dt_bias;             // decay: Mamba-1 A log2(e) as [N, E], Mamba-2 A [H]
    const float *gate_scale, *gated_norm;         // [E] or null; [E] (Mamba-2)
    const float *u_scale, *dt_scale, *B_scale, *C_scale, *z_scale;  // of int8 inputs of the scan: [E] or [G, N]; all or none
    Matrix in, x, dt, out;
    Rotation x_rotation, out_rotation;

    int64_t conv_channels() const { return ssd ? channels + 2 * groups * states : channels; }
    int64_t conv_offset() const { return ssd ? channels : 0; }
};

// The state of a block before and after the step; both may be the same memory. Strides count floats. Of an int8 state, `from`
// and `to` are the scales, Mamba-1's codes lie as [M, N, E], and steps_to is written when the step is over.
struct State {
    const float *conv_from, *from;
    float *conv_to, *to;
    int64_t conv_from_batch, conv_from_token, conv_from_channel, conv_to_batch, conv_to_token, conv_to_channel;
    int64_t from_states_first, to_states_first;  // Mamba-1: 1 where the state lies as [M, N, E], 0 as [M, E, N]
    const int8_t* codes_from;                    // null: the state is fp32
    int8_t* codes_to;
    const int64_t* steps_from;  // [M]
    int64_t* steps_to;
};

constexpr int64_t MAX_WIDTH = 16;  // of the convolution

}  // namespace mc
