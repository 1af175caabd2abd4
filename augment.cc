// What data.py does to views in less than half of OpenCV's time, in place, on uint8 BGR pixels. Each
// loop is written so that the compiler turns it into instructions for 16 or 32 pixels or bytes at a
// time: everything fits into 16 bits, and nothing needs a division.
//
// A step of colour moves a value v away from an origin by a factor f: to origin + f (v - origin),
// rounded down and cut to 0 .. 255.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

// Unrolling the loop over the taps of a blur would break the vectors of the loop inside.
#pragma GCC optimize("no-loop-unroll-and-jam")

#define VECTORIZED __attribute__((target_clones("avx2", "default")))

namespace {

using Int = int16_t;
using Word = uint16_t;

inline Int Min(Int a, Int b) { return a < b ? a : b; }
inline Int Max(Int a, Int b) { return a > b ? a : b; }
inline Int Clip(Int v) { return Min(Max(v, 0), 255); }

// The upper half of a product.
inline Int High(Int a, Int b) { return (static_cast<int32_t>(a) * b) >> 16; }
inline Word High(Word a, Word b) { return (static_cast<uint32_t>(a) * b) >> 16; }

// OpenCV's (3735 b + 19235 g + 9798 r + 2^14) / 2^15, rounded down: of each factor, its upper byte
// (rounded to the nearest) and its lower one are multiplied on their own.
inline Int Luma(Int b, Int g, Int r) {
  const Int low = -105 * b + 35 * g + 70 * r;
  return static_cast<Word>(15 * b + 75 * g + 38 * r + (low >> 8) + 64) >> 7;
}

// Multiplies -255 .. 255 by a factor of -2 .. 2 and rounds down. The factor has 22 bits behind the
// point, 6 in `whole`, 16 in `part`; what is less than 0.0003 below a whole number counts as that,
// so that the rounding of the factor does not matter.
struct Factor {
  Int whole, part;

  explicit Factor(double factor)
      : whole(std::lrint(64 * factor)),
        part(std::min(std::lrint(65536 * (64 * factor - whole)), 32767L)) {}

  Int operator*(Int d) const {
    const Int fine = High(part, static_cast<Int>(64 * d)) + 1;
    const Int sum = whole * d + (fine >> 6);
    return sum >> 6;
  }
};

}  // namespace

// ---------------------------------------------------------------------------------------- colours
// These have a plane for each channel: to take pixels apart is as much work as a step.

namespace {

VECTORIZED void Split(const uint8_t* pixels, int64_t count, uint8_t* blue, uint8_t* green,
                      uint8_t* red) {
  for (int64_t i = 0; i < count; ++i) {
    blue[i] = pixels[3 * i];
    green[i] = pixels[3 * i + 1];
    red[i] = pixels[3 * i + 2];
  }
}

VECTORIZED void Merge(const uint8_t* blue, const uint8_t* green, const uint8_t* red, int64_t count,
                      uint8_t* pixels) {
  for (int64_t i = 0; i < count; ++i) {
    pixels[3 * i] = blue[i];
    pixels[3 * i + 1] = green[i];
    pixels[3 * i + 2] = red[i];
  }
}

VECTORIZED void Scale(uint8_t* values, int64_t count, Int origin, double factor) {
  const Factor f(factor);
  for (int64_t i = 0; i < count; ++i) {
    values[i] = Clip(origin + f * static_cast<Int>(values[i] - origin));
  }
}

VECTORIZED double MeanLuma(const uint8_t* blue, const uint8_t* green, const uint8_t* red,
                           int64_t count) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < count; begin += 1 << 16) {
    const int64_t end = std::min(count, begin + (1 << 16));
    uint32_t sum = 0;
    for (int64_t i = begin; i < end; ++i) sum += Luma(blue[i], green[i], red[i]);
    total += sum;
  }
  return static_cast<double>(total) / count;
}

// Each pixel's origin is its luma.
VECTORIZED void Saturate(uint8_t* blue, uint8_t* green, uint8_t* red, int64_t count,
                         double factor) {
  const Factor f(factor);
  for (int64_t i = 0; i < count; ++i) {
    const Int b = blue[i], g = green[i], r = red[i], luma = Luma(b, g, r);
    blue[i] = Clip(luma + f * static_cast<Int>(b - luma));
    green[i] = Clip(luma + f * static_cast<Int>(g - luma));
    red[i] = Clip(luma + f * static_cast<Int>(r - luma));
  }
}

// Cuts a number of eighths to 0 .. unit and rounds it.
inline Int Below(Int eighths, Int unit) { return (Max(0, Min(eighths, unit)) + 4) >> 3; }

inline Int Distance(Int a, Int b) { return Max(a, b) - Min(a, b); }

// Of a colour whose channels are at most v and at least v - d, hue is a position h on a circle of
// length 6 with red, green and blue at 0, 2 and 4. v exceeds red by d * cut(2 - |h - 3|), green by
// d * cut(|h - 2| - 1) and blue by d * cut(|h - 4| - 1), where cut() is to 0 .. 1. Multiplied by d,
// this needs no division. So all positions here are d times as large, in eighths.
// OpenCV's way, to HSV and back, also rounds hue and saturation.
//
// shift: in 65536ths of a turn.
VECTORIZED void TurnHue(uint8_t* blue, uint8_t* green, uint8_t* red, int64_t count, Word shift) {
  for (int64_t i = 0; i < count; ++i) {
    const Int b = blue[i], g = green[i], r = red[i];
    const Int v = Max(Max(b, g), r), d = v - Min(Min(b, g), r), unit = 8 * d;
    const Word circle = 6 * unit;
    const Int old = v == r ? g - b : v == g ? 2 * d + b - r : 4 * d + r - g;  // -d .. 5 d
    Word turned = 8 * old + High(circle, shift);
    // what is negative is a large Word
    turned = std::min<Word>(turned, turned + circle);
    turned = std::min<Word>(turned, turned - circle);
    const Int h = turned;
    blue[i] = v - Below(Distance(h, 4 * unit) - unit, unit);
    green[i] = v - Below(Distance(h, 2 * unit) - unit, unit);
    red[i] = v - Below(2 * unit - Distance(h, 3 * unit), unit);
  }
}

}  // namespace

// Takes steps one after another; the number of a kind is its place in data.py's JITTER.
extern "C" void jitter(uint8_t* pixels, int64_t count, const int32_t* kinds, const double* values,
                       int64_t num_steps) {
  const std::unique_ptr<uint8_t[]> planes(new uint8_t[3 * count]);
  uint8_t *const blue = planes.get(), *const green = blue + count, *const red = green + count;
  Split(pixels, count, blue, green, red);
  for (int64_t i = 0; i < num_steps; ++i) {
    const double value = values[i];
    switch (kinds[i]) {
      case 0:  // brightness
        Scale(blue, 3 * count, 0, value);
        break;
      case 1:  // contrast
        Scale(blue, 3 * count, static_cast<Int>(MeanLuma(blue, green, red, count) + 0.5), value);
        break;
      case 2:  // saturation
        Saturate(blue, green, red, count, value);
        break;
      case 3:  // hue: the official code cuts shifts to 255ths of a turn, and takes them for 256ths
        TurnHue(blue, green, red, count, (static_cast<int>(value * 255) & 255) << 8);
        break;
    }
  }
  Merge(blue, green, red, count, pixels);
}

// ------------------------------------------------------------------------------------------ blur

// Blurs with a symmetric kernel, the border repeated. Rows are blurred into a ring, in 128ths; once
// it holds a row and its neighbours, their sum takes the place of the row.
//
// taps: the middle one and `radius` to one side of it, in 256ths; all together are 256.
extern "C" VECTORIZED void blur(uint8_t* pixels, int64_t height, int64_t width,
                                const uint16_t* taps, int64_t radius) {
  constexpr int kBlock = 96;  // so many sums stay in registers
  const int64_t row = 3 * width, stride = (row + kBlock - 1) / kBlock * kBlock;
  int64_t slots = 1;
  while (slots < 2 * radius + 1) slots *= 2;
  std::vector<Word> ring(slots * stride), line(stride + 6 * radius);
  std::vector<uint8_t> result(stride);
  Word* const padded = &line[3 * radius];
  const auto slot = [&](int64_t y) {
    return &ring[(std::min(std::max<int64_t>(y, 0), height - 1) & (slots - 1)) * stride];
  };

  for (int64_t y = -radius; y < height; ++y) {
    if (y + radius < height) {
      const uint8_t *const in = pixels + (y + radius) * row, *const end = in + row;
      std::copy(in, end, padded);
      for (int64_t k = 1; k <= radius; ++k) {
        std::copy(in, in + 3, padded - 3 * k);
        std::copy(end - 3, end, padded + row + 3 * (k - 1));
      }
      Word* const out = slot(y + radius);
      for (int64_t x = 0; x < stride; x += kBlock) {
        Word sum[kBlock];
        for (int i = 0; i < kBlock; ++i) sum[i] = taps[0] * padded[x + i];
        for (int64_t k = 1; k <= radius; ++k) {
          const Word *const left = padded + x - 3 * k, *const right = padded + x + 3 * k;
          for (int i = 0; i < kBlock; ++i) {
            sum[i] += taps[k] * static_cast<Word>(left[i] + right[i]);
          }
        }
        for (int i = 0; i < kBlock; ++i) out[x + i] = sum[i] / 2;
      }
    }
    if (y < 0) continue;
    // High() rounds down: radius / 2 makes up for it
    const Word bias = 64 + radius / 2, half_tap = taps[0] << 7;
    for (int64_t x = 0; x < stride; x += kBlock) {
      const Word* const middle = slot(y) + x;
      Word sum[kBlock];
      for (int i = 0; i < kBlock; ++i) {
        sum[i] = bias + High(half_tap, static_cast<Word>(2 * middle[i]));
      }
      for (int64_t k = 1; k <= radius; ++k) {
        const Word *const above = slot(y - k) + x, *const below = slot(y + k) + x;
        const Word tap = taps[k] << 8;
        for (int i = 0; i < kBlock; ++i) {
          sum[i] += High(tap, static_cast<Word>(above[i] + below[i]));
        }
      }
      for (int i = 0; i < kBlock; ++i) result[x + i] = sum[i] >> 7;
    }
    std::copy_n(result.data(), row, pixels + y * row);
  }
}
