// Functions of this library that others of it call; each says what it does where it is defined.
#pragma once

extern "C" {

long shoal_split_slots(const long* group_of_slot, const long* slots, long count, long top, const int* owner,
                       long owners, long* rows, long* kept_slots, int* slot_row, int* slot_group, long* first_row,
                       long* first_slot);

void shoal_combine(const long* const* slots, const float* const* y, const long* counts, long parts,
                   const float* weights, long rows, long top, long width, const float* residual, const float* other,
                   float* out);

long shoal_experts(const float* x, long x_stride, long rows, long pairs, const int* pair_row, const int* pair_expert,
                   const void* const* gate_up, const void* const* down, const long* narrow, long experts, long width,
                   long inner, float* out, long out_stride, const float* add);

}  // extern "C"
