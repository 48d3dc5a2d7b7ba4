// Which probabilities are dropped: the counter layout of cuflash/dropout.py. One Philox call serves eight scores, which one
// thread holds when the queries are the rows of a slab, and two lanes share when the keys are.
#pragma once

#include "tile/fragment.cuh"

namespace tile {

struct Random {
  uint32 word[4];
};

// Philox-4x32 with 7 rounds (Salmon et al., SC 2011).
DEVICE Random philox(uint32 c0, uint32 c1, uint32 c2, uint32 c3, uint32 key0, uint32 key1) {
#pragma unroll
  for (int round = 0; round < 7; ++round) {
    const uint64 product0 = static_cast<uint64>(0xD2511F53u) * c0;
    const uint64 product1 = static_cast<uint64>(0xCD9E8D57u) * c2;
    c0 = static_cast<uint32>(product1 >> 32) ^ c1 ^ key0;
    c2 = static_cast<uint32>(product0 >> 32) ^ c3 ^ key1;
    c1 = static_cast<uint32>(product1);
    c3 = static_cast<uint32>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Which elements of a slab are dropped, for later than it is decided: element i is bit i % 32 of word i / 32.
template <int kSize>
struct Dropped {
  uint32 word[(kSize + 31) / 32];

  DEVICE bool operator[](int i) const { return word[i / 32] >> i % 32 & 1; }
  // A probability, negative where it is dropped: one register for both.
  DEVICE float mark(int i, float probability) const { return arch::with_sign(probability, word[i / 32] << (31 - i % 32)); }
};

// What Philox says of a slab's first elements, for later than it is asked.
template <int kCalls>
struct Draws {
  uint32 word[kCalls > 0 ? 4 * kCalls : 1];

  // A number that is not negative either, and that nobody knows before everything has been drawn.
  DEVICE int known_after(int not_negative) const {
    uint32 known = static_cast<uint32>(not_negative);
#pragma unroll
    for (int t = 0; t < kCalls; ++t) known &= word[4 * t] & word[4 * t + 2];
    return static_cast<int>(known);
  }
};

struct Dropout {
  uint32 seed_low, seed_high, offset, batch_head;
  uint32 threshold;  // in the upper half: a word is compared whole for its high score, shifted for its low one

  DEVICE Dropout(const DropoutKey& key, int batch, int head)
      : seed_low(key.seed_low),
        seed_high(key.seed_high),
        offset(key.offset),
        batch_head(static_cast<uint32>(head) | static_cast<uint32>(batch) << 16),
        threshold(key.threshold << 16) {}

  DEVICE Random random(uint32 query_group, uint32 key_group) const {
    return philox(query_group, key_group, batch_head, offset, seed_low, seed_high);
  }
  // Queries i < 8 (mod 16) have the low half of a word, i + 8 the high one.
  DEVICE bool keeps_low(uint32 word) const { return (word << 16) >= threshold; }
  DEVICE bool keeps_high(uint32 word) const { return word >= threshold; }

  // Calls visit(i, keep) for every element of a slab whose first score is (query, key), both multiples of 16.
  template <class Orientation, int kSize, class Visitor>
  DEVICE void for_each(int query, int key, Visitor visit) const;
  // The same for slabs of query rows, in two steps: the first calls of Philox, and later the rest of them with all that they decide.
  template <int kCalls>
  DEVICE void draw(Draws<kCalls>& draws, int query, int key) const;
  template <int kSize, int kCalls, class Visitor>
  DEVICE void for_each(const Draws<kCalls>& draws, int query, int key, Visitor visit) const;

  template <class Orientation, int kSize>
  DEVICE void decide(Dropped<kSize>& dropped, int query, int key) const {
#pragma unroll
    for (uint32& word : dropped.word) word = 0;
    for_each<Orientation, kSize>(query, key,
                                 [&](int i, bool keep) { dropped.word[i / 32] |= static_cast<uint32>(!keep) << i % 32; });
  }
};

template <class Orientation>
struct DropoutPattern;

template <>
struct DropoutPattern<QueryRows> {
  // Element 8t + 4b + 2h + p: key 8b + p (and the lane's), query 8h. Word 2p + b, half h.
  static DEVICE Random random(const Dropout& dropout, int query, int key, int t) {
    return dropout.random(query / 2 + lane_row(), key / 4 + arch::lane_index() % 4 + 4 * t);
  }
  template <class Visitor>
  static DEVICE void visit(const Dropout& dropout, const uint32* word, int t, Visitor visit) {
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      const int parity = w / 2, block = w % 2;
      visit(8 * t + 4 * block + parity, dropout.keeps_low(word[w]));
      visit(8 * t + 4 * block + 2 + parity, dropout.keeps_high(word[w]));
    }
  }
  template <int kSize, class Visitor>
  static DEVICE void for_each(const Dropout& dropout, int query, int key, Visitor visitor) {
#pragma unroll
    for (int t = 0; t < kSize / 8; ++t) visit(dropout, random(dropout, query, key, t).word, t, visitor);
  }
};

template <>
struct DropoutPattern<KeyRows> {
  // Element 8t + 4b + 2h + p: query 8b + p (and the lane's), key 8h. The lane's keys have one parity, so it needs two words each
  // of the calls for p = 0 and p = 1; lane ^ 4 has the other parity and needs the other two words of the same two calls.
  // Each of the two lanes makes the call whose p is its parity, and they exchange.
  template <int kSize, class Visitor>
  static DEVICE void for_each(const Dropout& dropout, int query, int key, Visitor visit) {
    const int parity = lane_row() % 2;
    const uint32 query_group = query / 2 + lane_column() + parity;
    const uint32 key_group = key / 4 + lane_row() / 2;
#pragma unroll
    for (int t = 0; t < kSize / 8; ++t) {
      const Random random = dropout.random(query_group + 8 * t, key_group);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const uint32 own = parity ? random.word[2 + h] : random.word[h];
        const uint32 other = arch::shuffle_xor(parity ? random.word[h] : random.word[2 + h], 4);
#pragma unroll
        for (int p = 0; p < 2; ++p) {
          const uint32 word = parity == p ? own : other;
          visit(8 * t + 2 * h + p, dropout.keeps_low(word));
          visit(8 * t + 4 + 2 * h + p, dropout.keeps_high(word));
        }
      }
    }
  }
};

template <class Orientation, int kSize, class Visitor>
DEVICE void Dropout::for_each(int query, int key, Visitor visit) const {
  DropoutPattern<Orientation>::template for_each<kSize>(*this, query, key, visit);
}

template <int kCalls>
DEVICE void Dropout::draw(Draws<kCalls>& draws, int query, int key) const {
#pragma unroll
  for (int t = 0; t < kCalls; ++t) {
    const Random random = DropoutPattern<QueryRows>::random(*this, query, key, t);
#pragma unroll
    for (int w = 0; w < 4; ++w) draws.word[4 * t + w] = random.word[w];
  }
}

template <int kSize, int kCalls, class Visitor>
DEVICE void Dropout::for_each(const Draws<kCalls>& draws, int query, int key, Visitor visit) const {
  using Pattern = DropoutPattern<QueryRows>;
#pragma unroll
  for (int t = 0; t < kSize / 8; ++t)
    Pattern::visit(*this, t < kCalls ? &draws.word[4 * t] : Pattern::random(*this, query, key, t).word, t, visit);
}

}  // namespace tile
