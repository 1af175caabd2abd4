// Turns the hue of uint8 BGR pixels, in place, in a third of the time of OpenCV's way to HSV and
// back, and without its rounding of hue and saturation. data.py calls it.
//
// Of a colour whose channels are at most v and at least v - d, hue is a position h on a circle of
// length 6 with red, green and blue at 0, 2 and 4; and a channel whose pure colour is at c has the
// value v - d * clamp(min(k, 4 - k), 0, 1), where k = (h + 5 - c) mod 6. Multiplied by d, this
// needs no division. So all positions here are d times as large, in eighths, and fit into 16 bits:
// then the compiler turns the loop into instructions for 8 or 16 pixels at a time.
#include <cstdint>

namespace {

using Int = int16_t;

constexpr Int kUnit = 8;

inline Int Min(Int a, Int b) { return a < b ? a : b; }
inline Int Max(Int a, Int b) { return a > b ? a : b; }

// What v exceeds a channel by, at a position 0 .. 2 * circle.
inline Int Below(Int position, Int circle, Int d) {
  const Int k = position >= circle ? position - circle : position;
  const Int below = Max(0, Min(Min(k, 4 * kUnit * d - k), kUnit * d));
  return (below + kUnit / 2) / kUnit;
}

}  // namespace

// shift: in 65536ths of a turn.
extern "C" __attribute__((target_clones("avx2", "default")))
void turn_hue(uint8_t* pixels, int64_t count, uint16_t shift) {
  for (int64_t i = 0; i < count; ++i) {
    const Int b = pixels[3 * i], g = pixels[3 * i + 1], r = pixels[3 * i + 2];
    const Int v = Max(Max(b, g), r), d = v - Min(Min(b, g), r), unit = kUnit * d;
    const Int circle = 6 * unit;
    Int h = v == r ? g - b : v == g ? 2 * d + b - r : 4 * d + r - g;  // -d .. 5 d
    h = kUnit * h + ((static_cast<uint32_t>(static_cast<uint16_t>(circle)) * shift) >> 16);
    h = h < 0 ? h + circle : h;
    h = h >= circle ? h - circle : h;
    pixels[3 * i] = v - Below(h + unit, circle, d);
    pixels[3 * i + 1] = v - Below(h + 3 * unit, circle, d);
    pixels[3 * i + 2] = v - Below(h + 5 * unit, circle, d);
  }
}
