// Decodes a box of a JPEG, to the pixels that OpenCV makes of it. All of the file is read, wherever
// the box is, so that damage is found. What this saves is to make pixels of coefficients around the
// box; that takes a third of the time of an image. What is not plain or not whole is left to OpenCV
// and Pillow: functions return 0 for it.
#include <algorithm>
#include <csetjmp>
#include <cstdint>
#include <cstdio>
#include <cstring>

#include <jpeglib.h>

namespace {

constexpr int64_t kMaxPixels = 1 << 26;  // what claims to be larger may be damaged

// A JPEG that was opened. Here and where it is used nothing has a destructor: Refuse() skips them.
struct Jpeg {
  jpeg_decompress_struct info;
  jpeg_error_mgr errors;
  jmp_buf refused;
};
thread_local Jpeg jpeg;  // all zeros, which jpeg_destroy_decompress() allows

int Close(int result) {
  jpeg_destroy_decompress(&jpeg.info);
  return result;
}

void Refuse(j_common_ptr) { longjmp(jpeg.refused, 1); }
void RefuseWarning(j_common_ptr, int level) {
  if (level < 0) longjmp(jpeg.refused, 1);  // the others are traces
}

// Whether OpenCV or Pillow may turn the image. OpenCV takes the first APP1 for EXIF, whatever it
// is; decoder.py has Pillow look at later ones.
bool MayBeTurned(const jpeg_saved_marker_ptr app1) {
  if (!app1) return false;
  for (jpeg_saved_marker_ptr later = app1->next; later; later = later->next) {
    if (later->data_length >= 6 && !std::memcmp(later->data, "Exif\0", 6)) return true;
  }
  const uint8_t* const exif = app1->data + 6;
  const int64_t length = static_cast<int64_t>(app1->data_length) - 6;
  const bool little_endian = length > 1 && exif[0] == 'I' && exif[1] == 'I';
  const auto number = [=](int64_t at, int bytes) -> int64_t {  // -1 where there is none
    if (at < 0 || at + bytes > length) return -1;
    int64_t value = 0;
    for (int i = 0; i < bytes; ++i) {
      value = value << 8 | exif[at + (little_endian ? bytes - 1 - i : i)];
    }
    return value;
  };
  if (number(2, 2) != 42) return false;
  const int64_t directory = number(4, 4), count = number(directory, 2);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t entry = directory + 2 + 12 * i;
    if (number(entry, 2) == 0x0112 && number(entry + 8, 2) != 1) return true;
  }
  return false;
}

// Whether it is gray or 4:4:4, 4:2:2 or 4:2:0. (Pixels of 4:4:0 depend on libjpeg's version. Of a
// progressive one, all coefficients are decoded before any pixel: there is nothing to save.)
bool IsPlain(jpeg_decompress_struct* info) {
  const int64_t pixels = static_cast<int64_t>(info->image_height) * info->image_width;
  if (jpeg_has_multiple_scans(info) || info->arith_code || info->data_precision != 8 ||
      pixels > kMaxPixels) {
    return false;
  }
  const jpeg_component_info* const planes = info->comp_info;
  const int h = planes[0].h_samp_factor, v = planes[0].v_samp_factor;
  if (info->num_components == 1) return info->jpeg_color_space == JCS_GRAYSCALE && h * v == 1;
  return info->num_components == 3 && info->jpeg_color_space == JCS_YCbCr && h <= 2 && v <= h &&
         planes[1].h_samp_factor * planes[1].v_samp_factor == 1 &&
         planes[2].h_samp_factor * planes[2].v_samp_factor == 1;
}

void ReadRows(jpeg_decompress_struct* info, JDIMENSION end, uint8_t* pixels, int64_t stride) {
  while (info->output_scanline < end) {
    JSAMPROW row = pixels + info->output_scanline * stride;
    jpeg_read_scanlines(info, &row, 1);
  }
}

}  // namespace

// Opens a JPEG and closes the one before; size: its height and width. `bytes` must stay until it is
// decoded.
extern "C" int open_jpeg(const uint8_t* bytes, int64_t count, int32_t* size) {
  jpeg_decompress_struct* const info = &jpeg.info;
  Close(0);
  info->err = jpeg_std_error(&jpeg.errors);
  jpeg.errors.error_exit = Refuse;
  jpeg.errors.emit_message = RefuseWarning;
  if (setjmp(jpeg.refused)) return Close(0);
  jpeg_create_decompress(info);
  jpeg_save_markers(info, JPEG_APP0 + 1, 0xffff);
  jpeg_mem_src(info, const_cast<uint8_t*>(bytes), count);
  jpeg_read_header(info, TRUE);
  if (!IsPlain(info) || MayBeTurned(info->marker_list)) return Close(0);
  size[0] = info->image_height;
  size[1] = info->image_width;
  return 1;
}

// Decodes a box of the JPEG that was opened to its place in `pixels`, BGR [height, width, 3] of the
// whole image; the others may be anything.
extern "C" int decode_box(uint8_t* pixels, int64_t y, int64_t x, int64_t height, int64_t width) {
  jpeg_decompress_struct* const info = &jpeg.info;
  if (setjmp(jpeg.refused)) return Close(0);
  info->out_color_space = JCS_EXT_BGR;
  jpeg_start_decompress(info);
  const int64_t rows = info->output_height, columns = info->output_width, stride = 3 * columns;
  // Where two pixels share one chroma, each gets a mean with the next one on its side. libjpeg does
  // not know that beyond the columns that are decoded; beyond the rows it does.
  const int64_t margin = info->max_h_samp_factor == 2 ? 2 : 0, bottom = y + height;
  JDIMENSION left = std::max<int64_t>(x - margin, 0);
  JDIMENSION wanted = std::min(x + width + margin, columns) - left;
  jpeg_crop_scanline(info, &left, &wanted);  // `left` goes to where a block begins
  if (y > 0) jpeg_skip_scanlines(info, y);
  ReadRows(info, bottom, pixels + 3 * left, stride);
  // libjpeg reads what it skips only if something comes behind it
  if (rows - 1 > bottom) jpeg_skip_scanlines(info, rows - 1 - bottom);
  ReadRows(info, rows, pixels + 3 * left, stride);
  jpeg_finish_decompress(info);
  return Close(1);
}
