/* A run of JPEG files read, decoded and cut in one call, without the interpreter between them: called by turbo.py.

   libturbojpeg of the system decodes (the TurboJPEG API of 1.5 and later), whose functions compiled.py finds and hands
   over. What is not plain and sound is left to Python, which decodes it strictly and names what is wrong with it. */

#include <stddef.h>
#include <stdint.h>
#include <unistd.h>

typedef void *Decoder;
typedef struct { /* tjInitDecompress, tjDecompressHeader3, tjDecompress2, tjDestroy */
    Decoder (*begin)(void);
    int (*header)(Decoder, const unsigned char *, unsigned long, int *, int *, int *, int *);
    int (*decode)(Decoder, const unsigned char *, unsigned long, unsigned char *, int, int, int, int, int);
    int (*end)(Decoder);
} TurboJpeg;

enum { S444, S422, S420, GREY };       /* TJSAMP_* that every version upsamples alike */
enum { YCBCR = 1, GREYSCALE = 2 };     /* TJCS_* */
enum { RGB = 0, STOP_ON_WARNING = 8192 }; /* TJPF_RGB, TJFLAG_STOPONWARNING (ignored before 2.1: a warning fails anyway) */
enum { MOST = 32 };                    /* the largest reduction that cut.c's 16 bits hold: MOST of cut.py */

int fastsimclr_cut(const uint8_t *crop, int64_t pitch, int height, int width, int size, uint8_t *out);

/* n files: data[k], or where that is NULL lengths[k] bytes of `file` from starts[k], read into `room`. Image k has
   sizes[k] = (height, width) pixels. With views == 0 it is decoded into out + out_starts[k]; else into `scratch`, and
   its crops boxes[v * stride + k] = (top, left, height, width) go to out[v * stride + k], size x size pixels each.
   left[k]: 1 where that was not done: a length of 0, a file that is not a sound JPEG of that size in grey or YCbCr, a
   box that is too large or not within it. */
void fastsimclr_jpegs(const TurboJpeg *turbo, int n, int file, const uint8_t *const *data, const int64_t *starts,
                      const int64_t *lengths, const int32_t (*sizes)[2], uint8_t *room, uint8_t *scratch, int views,
                      int64_t stride, const int32_t (*boxes)[4], int size, uint8_t *out, const int64_t *out_starts,
                      uint8_t *left) {
    Decoder decoder = turbo->begin();
    size_t bytes = 3 * (size_t)size * size;
    for (int k = 0; k < n; k++) {
        int width, height, sampling, colours;
        const uint8_t *bits = data ? data[k] : room;
        uint8_t *image = views ? scratch : out + out_starts[k];
        left[k] = 1;
        if (!decoder || lengths[k] <= 0) continue;
        if (!data && pread(file, room, (size_t)lengths[k], starts[k]) != lengths[k]) continue;
        if (turbo->header(decoder, bits, (unsigned long)lengths[k], &width, &height, &sampling, &colours)) continue;
        if (height != sizes[k][0] || width != sizes[k][1] || (colours != YCBCR && colours != GREYSCALE)) continue;
        if (sampling != S444 && sampling != S422 && sampling != S420 && sampling != GREY) continue;
        if (turbo->decode(decoder, bits, (unsigned long)lengths[k], image, width, 0, height, RGB, STOP_ON_WARNING)) continue;
        int v = 0;
        for (; v < views; v++) {
            const int32_t *box = boxes[v * stride + k];
            int top = box[0], from = box[1], rows = box[2], columns = box[3];
            if (top < 0 || from < 0 || rows < 1 || columns < 1 || top > height - rows || from > width - columns) break;
            if (rows > MOST * size || columns > MOST * size) break;
            const uint8_t *crop = image + 3 * ((int64_t)top * width + from);
            if (fastsimclr_cut(crop, 3 * (int64_t)width, rows, columns, size, out + (v * stride + k) * bytes)) break;
        }
        left[k] = v < views;
    }
    if (decoder) turbo->end(decoder);
}
