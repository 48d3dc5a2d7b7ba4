// Which tile a CTA works on. Grids are one-dimensional: grid dimensions y and z are limited to 65535.
#pragma once

#include "tile/sequence.cuh"

namespace tile {

struct TileIndex {
  int block;
  int head;
  int batch;
};

// Blocks of one head after another: CTAs that run together share that head's keys and values in L2.
DEVICE TileIndex head_after_head(int index, int num_blocks, int num_heads) {
  const int pair = index / num_blocks;
  return {index - pair * num_blocks, pair % num_heads, pair / num_heads};
}

// Tiles of unequal length, longest first, so that the last CTAs to start are the shortest. Block 0 is the longest. Sections of
// heads whose keys and values fit in L2 together are worked on one after another.
DEVICE TileIndex longest_first(int index, int num_blocks, int num_heads, int batch, int section_heads) {
  const int section = index / (section_heads * num_blocks);
  const int first_pair = section * section_heads;
  const int pairs = min(section_heads, batch * num_heads - first_pair);
  const int position = index - first_pair * num_blocks;
  const int pair = first_pair + position % pairs;
  return {position / pairs, pair % num_heads, pair / num_heads};
}

}  // namespace tile
