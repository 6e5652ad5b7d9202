/* Segment a grey picture: segment_c LIBRARY IMAGE.pgm LABELS.pgm [ENGINE] [K]
 *
 * Which Python and which packages: RECALLSEG_PYTHON, else what librecallseg was built with. */
#include <recallseg.h>
#include <stdio.h>
#include <stdlib.h>

static int failed(const char *what, recallseg_status status) {
  fprintf(stderr, "%s: %s: %s\n", what, recallseg_status_text(status), recallseg_last_error());
  return EXIT_FAILURE;
}

/* Read a binary PGM of 8 bits; the caller frees the pixels. */
static uint8_t *read_pgm(const char *path, int64_t *rows, int64_t *columns) {
  long width = 0, height = 0, most = 0;
  uint8_t *pixels = NULL;
  FILE *file = fopen(path, "rb");
  if (file == NULL) return NULL;
  if (fscanf(file, "P5 %ld %ld %ld", &width, &height, &most) == 3 && fgetc(file) != EOF &&
      most == 255 && width > 0 && height > 0 && width <= RECALLSEG_MAX_SIDE &&
      height <= RECALLSEG_MAX_SIDE) {
    const size_t size = (size_t)width * (size_t)height;
    pixels = malloc(size);
    if (pixels != NULL && fread(pixels, 1, size, file) != size) {
      free(pixels);
      pixels = NULL;
    }
  }
  fclose(file);
  *rows = height;
  *columns = width;
  return pixels;
}

static int write_pgm(const char *path, const uint8_t *pixels, int64_t rows, int64_t columns) {
  const size_t size = (size_t)(rows * columns);
  FILE *file = fopen(path, "wb");
  if (file == NULL) return 0;
  const int header = fprintf(file, "P5\n%ld %ld\n255\n", (long)columns, (long)rows) > 0;
  const int written = fwrite(pixels, 1, size, file) == size;
  return fclose(file) == 0 && header && written;
}

static recallseg_status report(recallseg_result *result) {
  recallseg_summary summary = RECALLSEG_SUMMARY_INIT;
  recallseg_status status = recallseg_result_summary(result, &summary);
  if (status != RECALLSEG_OK) return status;
  for (size_t i = 0; i < summary.structure_count; ++i) {
    recallseg_score score = RECALLSEG_SCORE_INIT;
    recallseg_recalled nearest = RECALLSEG_RECALLED_INIT;
    if ((status = recallseg_result_score(result, i, &score)) != RECALLSEG_OK) return status;
    if ((status = recallseg_result_recalled(result, i, 0, &nearest)) != RECALLSEG_OK) return status;
    printf("%d %s: %lu px, IoU estimate %.6f, object score %.6f, nearest exemplar %s (%.6f)\n",
           (int)score.label, score.structure, (unsigned long)score.pixels, score.iou,
           score.object_score, nearest.key, nearest.similarity);
  }
  printf("quality %d, k=%d, %s %s\nbundle %s\nlibrary %s\n", (int)summary.quality, (int)summary.k,
         summary.engine, summary.precision, summary.bundle_identity, summary.library_digest);
  fprintf(stderr, "%.1f ms %s\n", summary.total_ms, summary.notice);
  return RECALLSEG_OK;
}

int main(int argc, char **argv) {
  if (argc < 4) {
    fprintf(stderr, "usage: %s LIBRARY IMAGE.pgm LABELS.pgm [ENGINE] [K]\n", argv[0]);
    return 2;
  }
  int64_t rows = 0, columns = 0;
  uint8_t *pixels = read_pgm(argv[2], &rows, &columns);
  uint8_t *labels = pixels == NULL ? NULL : malloc((size_t)(rows * columns));
  if (labels == NULL) {
    fprintf(stderr, "%s: not a binary PGM of 8 bits\n", argv[2]);
    free(pixels);
    return EXIT_FAILURE;
  }

  int outcome = EXIT_FAILURE;
  recallseg_library *library = NULL;
  recallseg_segmenter *segmenter = NULL;
  recallseg_result *result = NULL;
  recallseg_segmenter_options options = RECALLSEG_SEGMENTER_OPTIONS_INIT;
  recallseg_image image = RECALLSEG_IMAGE_INIT;
  recallseg_output output = RECALLSEG_OUTPUT_INIT;
  if (argc > 4) options.engine = argv[4];
  if (argc > 5) options.k = atoi(argv[5]);
  image.dtype = RECALLSEG_UINT8;
  image.data = pixels;
  image.ndim = 2;
  image.shape[0] = output.rows = rows;
  image.shape[1] = output.columns = columns;
  output.label_map = labels;

  recallseg_status status = recallseg_init(RECALLSEG_ABI_VERSION, NULL);
  if (status != RECALLSEG_OK) {
    failed("recallseg_init", status);
  } else if ((status = recallseg_library_open(argv[1], NULL, &library)) != RECALLSEG_OK) {
    failed(argv[1], status);
  } else if ((status = recallseg_segmenter_open(library, &options, &segmenter)) != RECALLSEG_OK) {
    failed("recallseg_segmenter_open", status);
  } else if ((status = recallseg_segment(segmenter, &image, &output, 60e3, &result)) !=
             RECALLSEG_OK) {
    failed(argv[2], status);
  } else if ((status = report(result)) != RECALLSEG_OK) {
    failed("result", status);
  } else if (!write_pgm(argv[3], labels, rows, columns)) {
    perror(argv[3]);
  } else {
    outcome = EXIT_SUCCESS;
  }
  if (recallseg_shutdown() != RECALLSEG_OK && outcome == EXIT_SUCCESS) /* closes every handle */
    outcome = EXIT_FAILURE;
  free(labels);
  free(pixels);
  return outcome;
}
