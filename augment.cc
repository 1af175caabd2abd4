// What views.py does to uint8 BGR pixels: it resizes a box, and changes colours and blurs in
// place. Each loop is written so that the compiler turns it into instructions for 8 to 32 pixels or
// bytes at a time.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

#define VECTORIZED __attribute__((target_clones("avx2", "default")))

namespace {

using Int = int16_t;
using Word = uint16_t;

template <class T>
std::unique_ptr<T[]> Allocate(int64_t count) {  // and leave it as it is
  return std::unique_ptr<T[]>(new T[count]);
}

// The upper half of a product.
inline Int High(Int a, Int b) { return (static_cast<int32_t>(a) * b) >> 16; }
inline Word High(Word a, Word b) { return (static_cast<uint32_t>(a) * b) >> 16; }

}  // namespace

// ---------------------------------------------------------------------------------------- resize
// OpenCV's bilinear resize, to the bit: weights are 2048ths, and a pixel between two columns is
// kept in 128ths.

namespace {

constexpr Int kWhole = 2048;

// Where a pixel of the result lies between two of an edge: behind `at` by `part` of 2048.
struct Place {
  int64_t at;
  Int part;

  Place(int64_t i, int64_t length, int64_t size) {
    const double scale = 1 / (static_cast<double>(size) / length);
    const float place = (i + 0.5) * scale - 0.5;
    at = std::floor(place);
    part = std::lrint((place - at) * kWhole);
  }
};

// Interpolates between columns: l (2048 - part) + r part = 1024 (l + r) + (part - 1024) (r - l).
VECTORIZED void Across(const uint8_t* left, const uint8_t* right, const Int* parts, int64_t count,
                       Int* out) {
  for (int64_t i = 0; i < count; ++i) {
    const Int l = left[i], r = right[i];
    out[i] = 64 * (l + r) + High(static_cast<Int>(128 * (r - l)), parts[i]);
  }
}

// Interpolates between rows.
VECTORIZED void Down(const Int* top, const Int* bottom, Int part, int64_t count, uint8_t* out) {
  for (int64_t i = 0; i < count; ++i) {
    const Int quarters = High(top[i], static_cast<Int>(kWhole - part)) + High(bottom[i], part);
    out[i] = (quarters + 2) >> 2;
  }
}

}  // namespace

// Resizes a box of height x width pixels, whose rows begin `stride` bytes apart, to rows x columns,
// and writes those size x size that begin at (y0, x0).
extern "C" void resize(const uint8_t* box, int64_t stride, int64_t height, int64_t width,
                       int64_t rows, int64_t columns, int64_t y0, int64_t x0, uint8_t* out,
                       int64_t size) {
  const int64_t row = 3 * size;
  const auto numbers = Allocate<Int>(3 * row);
  Int *const parts = &numbers[0], *top = parts + row, *bottom = top + row;
  const auto offsets = Allocate<int64_t>(size + 1);
  offsets[size] = 0;  // columns are taken in pairs
  for (int64_t x = 0; x < size; ++x) {
    Place place(x0 + x, width, columns);
    if (place.at < 0) place.at = place.part = 0;
    if (place.part == kWhole) ++place.at, place.part = 0;
    if (place.at >= width - 1) place.at = width - 1, place.part = 0;
    offsets[x] = 3 * place.at;
    for (int c = 0; c < 3; ++c) parts[3 * x + c] = 32 * (place.part - 1024);
  }

  // Of each column, the pixel that it begins with and the next one, which for the last column does
  // not count. Eight bytes are read and written, where six or three matter; the lowest one is first,
  // as on all processors that TensorFlow is built for.
  const auto bytes = Allocate<uint8_t>(2 * row + 12 + 3 * width + 5);
  uint8_t *const left = &bytes[0], *const right = left + row + 6, *const last = right + row + 6;
  const auto read = [&](int64_t y, Int* to) {
    const uint8_t* from = box + y * stride;
    if (y == height - 1 || width == 1) {  // its last 8 bytes may not be there
      std::memcpy(last, from, 3 * width);
      from = last;
    }
    constexpr uint64_t kPixel = 0xffffff;
    for (int64_t x = 0; x < size; x += 2) {
      uint64_t u, v;
      std::memcpy(&u, from + offsets[x], 8);
      std::memcpy(&v, from + offsets[x + 1], 8);
      const uint64_t l = (u & kPixel) | (v & kPixel) << 24;
      const uint64_t r = (u >> 24 & kPixel) | (v & kPixel << 24);
      std::memcpy(left + 3 * x, &l, 8);
      std::memcpy(right + 3 * x, &r, 8);
    }
    Across(left, right, parts, row, to);
  };

  int64_t top_y = -1, bottom_y = -1;  // what `top` and `bottom` are of
  for (int64_t y = 0; y < size; ++y) {
    const Place place(y0 + y, height, rows);
    const int64_t first = std::max<int64_t>(place.at, 0);
    const int64_t second = std::min(place.at + 1, height - 1);
    if (first == bottom_y) std::swap(top, bottom), std::swap(top_y, bottom_y);
    if (first != top_y) read(top_y = first, top);
    if (second != bottom_y) read(bottom_y = second, bottom);
    Down(top, bottom, place.part, row, out + y * row);
  }
}

// ---------------------------------------------------------------------------------------- colours
// The published weights saw colours that were float32 until the last step, and cut off to uint8
// then. Here they are in 16ths, 0 .. 4080, for which each step has room in 16 bits. There is a plane
// for each channel: to take pixels apart is as much work as a step.

namespace {

constexpr Int kOne = 16, kWhite = 255 * kOne;

inline Int Min(Int a, Int b) { return a < b ? a : b; }
inline Int Max(Int a, Int b) { return a > b ? a : b; }
inline Int Clip(Int v) { return Min(Max(v, 0), kWhite); }

// 0.114 b + 0.587 g + 0.299 r, of ITU-R 601: three products in 128ths, each rounded down.
inline Int Luma(Int b, Int g, Int r) {
  const Word sum = High(static_cast<Word>(8 * b), Word{7471}) +
                   High(static_cast<Word>(8 * g), Word{38470}) +
                   High(static_cast<Word>(8 * r), Word{19595});
  return (sum + 5) >> 3;
}

// Moves a value v away from an origin by a factor f of 0 to 2: to v + (f - 1) (v - origin).
struct Move {
  Int part;  // f - 1, in 2^15ths

  explicit Move(double factor) : part(std::min(std::lrint(32768 * (factor - 1)), 32767L)) {}

  Int operator()(Int v, Int origin) const {
    const Int distance = v - origin;
    return Clip(v + (((distance * part >> 14) + 1) >> 1));  // an instruction of AVX2, and rounded
  }
};

VECTORIZED void Split(const uint8_t* pixels, int64_t count, Int* blue, Int* green, Int* red) {
  for (int64_t i = 0; i < count; ++i) {
    blue[i] = kOne * pixels[3 * i];
    green[i] = kOne * pixels[3 * i + 1];
    red[i] = kOne * pixels[3 * i + 2];
  }
}

VECTORIZED void Merge(const Int* blue, const Int* green, const Int* red, int64_t count,
                      uint8_t* pixels) {
  for (int64_t i = 0; i < count; ++i) {
    pixels[3 * i] = static_cast<Word>(blue[i]) / kOne;
    pixels[3 * i + 1] = static_cast<Word>(green[i]) / kOne;
    pixels[3 * i + 2] = static_cast<Word>(red[i]) / kOne;
  }
}

VECTORIZED void Scale(Int* values, int64_t count, Int origin, double factor) {
  const Move move(factor);
  for (int64_t i = 0; i < count; ++i) values[i] = move(values[i], origin);
}

VECTORIZED double MeanLuma(const Int* blue, const Int* green, const Int* red, int64_t count) {
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
VECTORIZED void Saturate(Int* blue, Int* green, Int* red, int64_t count, double factor) {
  const Move move(factor);
  for (int64_t i = 0; i < count; ++i) {
    const Int b = blue[i], g = green[i], r = red[i], luma = Luma(b, g, r);
    blue[i] = move(b, luma);
    green[i] = move(g, luma);
    red[i] = move(r, luma);
  }
}

VECTORIZED void Gray(Int* blue, Int* green, Int* red, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    blue[i] = green[i] = red[i] = Luma(blue[i], green[i], red[i]);
  }
}

inline Int Cut(Int value, Int limit) { return Max(0, Min(value, limit)); }

inline Int Distance(Int a, Int b) { return Max(a, b) - Min(a, b); }

// Of a colour whose channels are at most v and at least v - d, hue is a position h on a circle of
// length 6 with red, green and blue at 0, 2 and 4. v exceeds red by d * cut(2 - |h - 3|), green by
// d * cut(|h - 2| - 1) and blue by d * cut(|h - 4| - 1), where cut() is to 0 .. 1. Multiplied by d,
// this needs no division. So all positions here are d times as large.
//
// shift: in 65536ths of a turn.
VECTORIZED void TurnHue(Int* blue, Int* green, Int* red, int64_t count, Word shift) {
  for (int64_t i = 0; i < count; ++i) {
    const Int b = blue[i], g = green[i], r = red[i];
    const Int v = Max(Max(b, g), r), d = v - Min(Min(b, g), r), circle = 6 * d;
    const Int old = v == r ? g - b : v == g ? 2 * d + b - r : 4 * d + r - g;  // -d .. 5 d
    Word turned = old + (old < 0 ? circle : 0) + High(static_cast<Word>(circle), shift);
    turned = std::min<Word>(turned, turned - circle);  // what is negative is a large Word
    const Int h = turned;
    blue[i] = v - Cut(Distance(h, 4 * d) - d, d);
    green[i] = v - Cut(Distance(h, 2 * d) - d, d);
    red[i] = v - Cut(2 * d - Distance(h, 3 * d), d);
  }
}

}  // namespace

// Takes steps one after another; the number of a kind is its place in views.py's STEPS.
extern "C" void jitter(uint8_t* pixels, int64_t count, const int32_t* kinds, const double* values,
                       int64_t num_steps) {
  const auto planes = Allocate<Int>(3 * count);
  Int *const blue = planes.get(), *const green = blue + count, *const red = green + count;
  Split(pixels, count, blue, green, red);
  for (int64_t i = 0; i < num_steps; ++i) {
    const double value = values[i];
    switch (kinds[i]) {
      case 0:  // brightness
        Scale(blue, 3 * count, 0, value);
        break;
      case 1:  // contrast
        Scale(blue, 3 * count, std::lrint(MeanLuma(blue, green, red, count)), value);
        break;
      case 2:  // saturation
        Saturate(blue, green, red, count, value);
        break;
      case 3:  // hue
        TurnHue(blue, green, red, count, std::lrint(65536 * (value - std::floor(value))));
        break;
      case 4:  // grayscale
        Gray(blue, green, red, count);
        break;
    }
  }
  Merge(blue, green, red, count, pixels);
}

// ------------------------------------------------------------------------------------------ blur
// PIL's GaussianBlur, to the bit: in each direction three box blurs, rounded to uint8 each time.

namespace {

constexpr int kPasses = 3;
constexpr int kBlock = 96;  // sums of so many pixels stay in registers

// A box of a width between those of 2 radius + 1 and 2 radius + 3 pixels: the outer two count less.
struct Box {
  int64_t radius;
  uint32_t weight, outer;  // in 2^24ths

  // The box whose variance is a third of sigma's (Gwosdek et al. 2011, equations 11 to 14). PIL
  // computes it in float, whose rounding the weights show.
  explicit Box(float sigma) {
    const float variance = sigma * sigma / kPasses;
    const float length = std::sqrt(12.0 * variance + 1.0);
    const float whole = std::floor((length - 1.0) / 2.0);
    float part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance);
    part /= 6 * (variance - (whole + 1) * (whole + 1));
    const float half = whole + part;
    radius = static_cast<int64_t>(half);
    weight = (1 << 24) / (half * 2 + 1);
    outer = ((1 << 24) - (2 * radius + 1) * weight) / 2;
  }
};

// Four pixels' values lie in a word; of two at a time, sums have 16 bits each.
struct Sums {
  uint32_t even[kBlock / 4], odd[kBlock / 4];

  void Add(const uint8_t* values) {
    for (int i = 0; i < kBlock / 4; ++i) {
      uint32_t word;
      std::memcpy(&word, values + 4 * i, 4);
      even[i] += word & 0x00ff00ff;
      odd[i] += word >> 8 & 0x00ff00ff;
    }
  }
};

// Blurs `count` values, whose neighbours are `step` apart; writes up to kBlock - 1 values more.
VECTORIZED void Blur(const uint8_t* in, uint8_t* out, int64_t count, int64_t step,
                     const Box& box) {
  const int64_t far = (box.radius + 1) * step;
  const uint32_t weight = box.weight, outer = box.outer;
  for (int64_t x = 0; x < count; x += kBlock) {
    Sums sums = {}, ends = {};
    sums.Add(in + x);
    for (int64_t k = step; k < far; k += step) {
      sums.Add(in + x - k);
      sums.Add(in + x + k);
    }
    ends.Add(in + x - far);
    ends.Add(in + x + far);
    const auto mean = [=](uint32_t inside, uint32_t outside) {  // in the upper byte
      return inside * weight + outside * outer + (1 << 23);
    };
    for (int i = 0; i < kBlock / 4; ++i) {
      const uint32_t word =
          mean(sums.even[i] & 0xffff, ends.even[i] & 0xffff) >> 24 |
          (mean(sums.odd[i] & 0xffff, ends.odd[i] & 0xffff) & 0xff000000) >> 16 |
          (mean(sums.even[i] >> 16, ends.even[i] >> 16) & 0xff000000) >> 8 |
          (mean(sums.odd[i] >> 16, ends.odd[i] >> 16) & 0xff000000);
      std::memcpy(out + x + 4 * i, &word, 4);
    }
  }
}

}  // namespace

// The border is repeated.
extern "C" void blur(uint8_t* pixels, int64_t height, int64_t width, double sigma) {
  const Box box(sigma);
  const int64_t reach = box.radius + 1, row = 3 * width, margin = 3 * reach, above = reach * row;

  // planes with lines above and below
  const int64_t size = height * row + 2 * above + kBlock;
  const auto planes = Allocate<uint8_t>(2 * size);
  uint8_t *plane = &planes[above], *next = plane + size;

  // lines with a margin at each end
  const int64_t length = row + 2 * margin + kBlock;
  const auto lines = Allocate<uint8_t>(2 * length);
  uint8_t *line = &lines[margin], *other = line + length;
  for (int64_t y = 0; y < height; ++y) {
    std::memcpy(line, pixels + y * row, row);
    for (int pass = 0; pass < kPasses; ++pass) {
      for (int64_t x = 0; x < margin; ++x) {
        line[x - margin] = line[x % 3];
        line[row + x] = line[row - 3 + x % 3];
      }
      Blur(line, other, row, 3, box);
      std::swap(line, other);
    }
    std::memcpy(plane + y * row, line, row);
  }
  for (int pass = 0; pass < kPasses; ++pass) {
    for (int64_t y = 1; y <= reach; ++y) {
      std::memcpy(plane - y * row, plane, row);
      std::memcpy(plane + (height - 1 + y) * row, plane + (height - 1) * row, row);
    }
    Blur(plane, next, height * row, row, box);
    std::swap(plane, next);
  }
  std::memcpy(pixels, plane, height * row);
}
