// Packed weight layouts: panels of 32 columns (rows of the [n, k] matrix), each one contiguous stream along k.
//   f32         [k][32] f32
//   f16         [k][32] binary16
//   bf16        [k/2][32][2] bfloat16, k padded to even with zeros
//   q4_0, q4_1  per group of 32 k a chunk: 8 vectors of 64 bytes, vector 2j+h = columns 16h..16h+15, each 4 bytes:
//               low nibbles k = 4j..4j+3, high nibbles k = 16+4j..16+4j+3; then 32 x f16 scale; q4_1: 32 x f16 minimum
//   q8_0        per group [8][32][4] u8 (value + 128), then 32 x f16 scale
//   q4_0_tiles, q4_1_tiles  per group 8 vectors of 32 words: nibble j of word k in vector i is the code of column 4i+j at k;
//               then the scales and minima as above
//   q8_0_tiles  per group [32 columns][32 k] s8, then 32 x f16 scale
// Columns beyond n are zero weights.
#pragma once
#include "views.h"

namespace pagemill {

size_t panel_bytes(Format format, int k);
size_t source_row_bytes(Format format, int k);  // bytes of a row as it stands in the checkpoint
// rows: [n][source_row_bytes], the checkpoint's blocks. Writes columns column0 .. column0+n-1 of a packed matrix, whose
// other columns stay; one that is not filled whole is zeroed before.
void pack_rows(Format format, const uint8_t* rows, int n, int k, int column0, uint8_t* packed);
// One row of the [n, k] matrix as f32, with the roundings of the format's own dequantisation.
void unpack_row(const Matrix& matrix, int row, float* out);

}  // namespace pagemill
