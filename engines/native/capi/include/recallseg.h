/*
 * RecallSeg for device software: segment medical images by recalling annotated ones.
 *
 * C99, and C++ (see recallseg.hpp for a wrapper with destructors). Every function returns a
 * recallseg_status and lets no exception out; recallseg_last_error() then says, for the calling
 * thread, what happened and how to mend it. docs/device/c.md is the manual.
 *
 * Threads: every function may be called from any thread. Queries of one segmenter wait for each
 * other; different segmenters run beside each other.
 *
 * Memory: pixels and masks belong to the caller and are used only until the call returns. Handles
 * belong to the library; a closed or made-up one is refused. Text that a struct points to lives as
 * long as the handle that it was read from.
 *
 * Structs: set struct_size to sizeof the struct (the *_INIT macros do) and everything unused to 0;
 * `reserved` that is not 0 is refused. Structs grow at their end, and 0 there is as it was before: a
 * program that was compiled with an older header runs with a newer library unchanged.
 *
 * The end: return from main or call exit whenever you like (docs/device/c.md, "Life").
 */
#ifndef RECALLSEG_H
#define RECALLSEG_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#error "librecallseg runs on Linux only"
#endif
#define RECALLSEG_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

#define RECALLSEG_VERSION "0.1.0"
/* Of this header: given to recallseg_init. 2 has all that is marked [2]; a library takes programs of
 * its own version and of every older one. */
#define RECALLSEG_ABI_VERSION 2u
#define RECALLSEG_MAX_SIDE 32767 /* most rows or columns of an image */

typedef int32_t recallseg_status;

enum {
  RECALLSEG_OK = 0,
  RECALLSEG_E_ARGUMENT = 1, /* a null pointer, wrong size, layout or text: the call is wrong */
  RECALLSEG_E_HANDLE = 2,   /* a handle that is closed, of another kind, or none at all */
  RECALLSEG_E_ABI = 3,      /* header, library and Python package do not fit together */
  RECALLSEG_E_STATE = 4,    /* not initialised, shut down, or initialised otherwise */
  RECALLSEG_E_FORKED = 5,   /* this process was forked from one that had initialised */
  RECALLSEG_E_PYTHON = 6,   /* the Python interpreter or the package is missing or unusable */
  RECALLSEG_E_INPUT = 7,    /* an image, mask, name or option cannot be used as it is */
  RECALLSEG_E_BUNDLE = 8,   /* the bundle is missing, damaged, too new or incomplete */
  RECALLSEG_E_ENGINE_UNAVAILABLE = 9, /* the engine's library, driver or device is not here */
  RECALLSEG_E_ENGINE = 10,            /* an engine failed */
  RECALLSEG_E_DEADLINE = 11,          /* not done in time; output memory may be half written */
  RECALLSEG_E_LIBRARY = 12,           /* something else is wrong with the library */
  RECALLSEG_E_LIBRARY_NOT_FOUND = 13,
  RECALLSEG_E_LIBRARY_CORRUPT = 14,
  RECALLSEG_E_LIBRARY_VERSION = 15,  /* written in a newer format */
  RECALLSEG_E_LIBRARY_MISMATCH = 16, /* made with another bundle */
  RECALLSEG_E_LIBRARY_LOCKED = 17,   /* another process is writing */
  RECALLSEG_E_LIBRARY_WRITE = 18,    /* open for reading only, read-only folder, full disk */
  RECALLSEG_E_MEMORY = 19,
  RECALLSEG_E_CANCELLED = 20, /* [2] by recallseg_segmenter_cancel; output memory may be half written */
  RECALLSEG_E_AUDIT = 21,     /* [2] the audit log cannot be written, was changed or is sealed */
  RECALLSEG_E_INTERNAL = 99 /* a defect of RecallSeg: please report it */
};

enum {
  RECALLSEG_UINT8 = 1,
  RECALLSEG_INT8 = 2,
  RECALLSEG_UINT16 = 3,
  RECALLSEG_INT16 = 4,
  RECALLSEG_UINT32 = 5,
  RECALLSEG_INT32 = 6,
  RECALLSEG_FLOAT32 = 7,
  RECALLSEG_FLOAT64 = 8
};

/* [2] Where memory lies that a struct points to. */
enum { RECALLSEG_HOST = 0, RECALLSEG_CUDA = 1 };

enum { RECALLSEG_QUALITY_UNCALIBRATED = 0, RECALLSEG_QUALITY_OK = 1, RECALLSEG_QUALITY_SUSPECT = 2 };

enum { RECALLSEG_LOG_DEBUG = 10, RECALLSEG_LOG_INFO = 20, RECALLSEG_LOG_WARNING = 30, RECALLSEG_LOG_ERROR = 40 };

/* Handles. Values, not addresses: never dereferenced, and never valid again once closed. */
typedef struct recallseg_library recallseg_library;
typedef struct recallseg_segmenter recallseg_segmenter;
typedef struct recallseg_result recallseg_result;
typedef struct recallseg_stream recallseg_stream;
typedef struct recallseg_list recallseg_list;   /* [2] */
typedef struct recallseg_audit recallseg_audit; /* [2] */

/* ---- Errors and versions: these four work at any time ---- */

RECALLSEG_API const char *recallseg_version(void);    /* of the library, "0.1.0" */
RECALLSEG_API uint32_t recallseg_abi_version(void);   /* of the library */
RECALLSEG_API const char *recallseg_status_text(recallseg_status status);
/* Of the last call on this thread that did not return RECALLSEG_OK; "" if there was none. Valid
 * until the thread's next failing call. */
RECALLSEG_API const char *recallseg_last_error(void);

/* ---- Life ---- */

/* Which interpreter and which package. Null or "" takes the environment variable, then what
 * librecallseg was built with; nothing is searched for along PATH. In a process that runs Python
 * already that interpreter is used, and these must be null. */
typedef struct recallseg_init_options {
  uint32_t struct_size;
  uint32_t reserved;
  const char *python;         /* executable, e.g. /opt/device/venv/bin/python; $RECALLSEG_PYTHON */
  const char *python_library; /* libpython3.X.so; else beside the executable; $RECALLSEG_PYTHON_LIBRARY */
  const char *python_home;    /* folder with lib/python3.X; else found from the executable */
  const char *site_packages;  /* folder to look into first; $RECALLSEG_SITE_PACKAGES */
} recallseg_init_options;
#define RECALLSEG_INIT_OPTIONS_INIT {sizeof(recallseg_init_options), 0, NULL, NULL, NULL, NULL}

/* Start, or attach to, the interpreter and check version and ABI of everything. Repeating it with
 * equal options is harmless. abi_version: RECALLSEG_ABI_VERSION. options may be null. */
RECALLSEG_API recallseg_status recallseg_init(uint32_t abi_version,
                                              const recallseg_init_options *options);

typedef struct recallseg_info {
  uint32_t struct_size;
  int32_t hosted;              /* 1: the process ran Python already; 0: started by recallseg_init */
  const char *python_version;  /* "3.11.7 ..." */
  const char *python_library;  /* file that the interpreter was loaded from */
  const char *python;          /* sys.executable */
  const char *python_prefix;   /* sys.prefix */
  const char *package_version; /* of the Python package recallseg */
  const char *package_folder;  /* where that is installed */
} recallseg_info;
#define RECALLSEG_INFO_INIT {sizeof(recallseg_info), 0, NULL, NULL, NULL, NULL, NULL, NULL}

RECALLSEG_API recallseg_status recallseg_get_info(recallseg_info *info);

/* Close every handle, as its own function does: no callback is in work any more once this has
 * returned, unless it is itself what called this. The interpreter stays (numpy cannot be loaded twice
 * in one process), so that recallseg_init may be called again. Calls in flight on other threads end as
 * usual. */
RECALLSEG_API recallseg_status recallseg_shutdown(void);

/* Called on whichever thread logs; must not throw. Messages hold no pixels and no patient data. Those
 * of ONNX Runtime's sessions come as logger "recallseg.onnxruntime" [2]. */
typedef void (*recallseg_log_callback)(int32_t level, const char *logger, const char *message,
                                       void *user);
/* Replace the callback; null for none. When this returns the old callback is no longer running,
 * unless it is itself what called this. level: least level that is passed on. */
RECALLSEG_API recallseg_status recallseg_set_log(recallseg_log_callback callback, void *user,
                                                 int32_t level);

/* ---- GPUs ---- */

/* [2] How an engine on a GPU uses it; engines on the CPU refuse it. Segmenters of one library that
 * are opened with equal values share a model. The context is the one that is current in the calling
 * thread, or the GPU's primary one. */
typedef struct recallseg_gpu_options {
  uint32_t struct_size;
  int32_t ordinal;      /* which GPU, counted among those that the process may use */
  void *stream;         /* CUstream or cudaStream_t of that context, which must outlive its use:
                           everything is queued there; null: a stream of its own */
  const char *provider; /* "cuda-bindings" or "pycuda"; null: the first that is installed */
  int32_t cuda_graphs;  /* 1: record each graph's work, and replay it */
  int32_t reserved;
  uint64_t cache_bytes; /* most bytes of recalled memories that stay there; 0: 256 MiB */
} recallseg_gpu_options;
#define RECALLSEG_GPU_OPTIONS_INIT {sizeof(recallseg_gpu_options), 0, NULL, NULL, 0, 0, 0}

/* ---- Libraries ---- */

typedef struct recallseg_library_options {
  uint32_t struct_size;
  int32_t writable;      /* 1: to add exemplars; one process at a time */
  const char *bundle;    /* folder or name; null: the one that the library was made with */
  const char *engine;    /* encodes exemplars; null: "onnxruntime-cpu" */
  const char *precision; /* null: "fp32" */
  int32_t threads;       /* 0: all cores that this process may use */
  int32_t reserved;
  const recallseg_gpu_options *gpu; /* [2] for an engine on a GPU; null: its defaults */
} recallseg_library_options;
#define RECALLSEG_LIBRARY_OPTIONS_INIT \
  {sizeof(recallseg_library_options), 0, NULL, NULL, NULL, 0, 0, NULL}

RECALLSEG_API recallseg_status recallseg_library_open(const char *folder,
                                                      const recallseg_library_options *options,
                                                      recallseg_library **library);
/* Make an empty library in a new folder, open for writing; options->bundle is needed. */
RECALLSEG_API recallseg_status recallseg_library_create(const char *folder,
                                                        const recallseg_library_options *options,
                                                        recallseg_library **library);

typedef struct recallseg_library_info {
  uint32_t struct_size;
  int32_t writable;
  uint64_t exemplars;
  uint64_t structures;
  const char *bundle_name;
  const char *bundle_identity;
  const char *digest; /* over all exemplars */
  const char *notice; /* what must be said of the weights, e.g. "demo model, not for clinical use" */
} recallseg_library_info;
#define RECALLSEG_LIBRARY_INFO_INIT {sizeof(recallseg_library_info), 0, 0, 0, NULL, NULL, NULL, NULL}

/* Read the library as it is now. The text lives until the next call for this handle. */
RECALLSEG_API recallseg_status recallseg_library_get_info(recallseg_library *library,
                                                          recallseg_library_info *info);
/* Its files are closed when its last segmenter is. */
RECALLSEG_API recallseg_status recallseg_library_close(recallseg_library *library);

/* ---- Images, masks, exemplars ---- */

/* Strides are bytes from one row, column, channel to the next and may be negative; all 0 means
 * packed rows. Aligned images with packed rows are not copied. */
typedef struct recallseg_image {
  uint32_t struct_size;
  int32_t dtype;      /* RECALLSEG_UINT8, ... */
  const void *data;   /* pixel (0, 0) */
  int32_t ndim;       /* 2: height x width, grey; 3: height x width x 3, RGB */
  int32_t reserved;
  int64_t shape[3];   /* rows, columns[, 3] */
  int64_t strides[3];
  double spacing[2];  /* mm from row to row and column to column; 0: unknown */
  int32_t location;   /* [2] RECALLSEG_CUDA: data is a device pointer, rows are packed, and the
                         segmenter's engine runs on that GPU. Exemplars come from the host */
  int32_t reserved2;
  void *stream;       /* [2] with RECALLSEG_CUDA: the pixels are there when what is queued on this
                         CUDA stream now is done; null: they are there. The default stream is
                         CU_STREAM_LEGACY, (void *)1 */
} recallseg_image;
#define RECALLSEG_IMAGE_INIT \
  {sizeof(recallseg_image), 0, NULL, 0, 0, {0, 0, 0}, {0, 0, 0}, {0, 0}, 0, 0, NULL}

typedef struct recallseg_tag {
  const char *name;
  const char *value;
} recallseg_tag;

/* A mask on the image's own grid: bytes of 0 and 1, or 0 and 255. */
typedef struct recallseg_mask {
  const char *structure;
  const uint8_t *data;
  int64_t strides[2]; /* as for images */
} recallseg_mask;

typedef struct recallseg_exemplar {
  uint32_t struct_size;
  uint32_t reserved;
  const recallseg_mask *masks;
  size_t mask_count;
  const char *const *absent; /* structures that the image is known not to show */
  size_t absent_count;
  const recallseg_tag *tags;
  size_t tag_count;
  const char *key; /* null: random */
} recallseg_exemplar;
#define RECALLSEG_EXEMPLAR_INIT {sizeof(recallseg_exemplar), 0, NULL, 0, NULL, 0, NULL, 0, NULL}

/* Add an annotated image; it is stored in full or not at all. key (may be null) receives the
 * exemplar's key, with its final 0; a key has at most 256 characters, 1025 bytes with the 0. */
RECALLSEG_API recallseg_status recallseg_library_add(recallseg_library *library,
                                                     const recallseg_image *image,
                                                     const recallseg_exemplar *exemplar, char *key,
                                                     size_t key_size);

/* [2] Erase an exemplar. An unknown key is RECALLSEG_E_INPUT. */
RECALLSEG_API recallseg_status recallseg_library_remove(recallseg_library *library,
                                                        const char *key);
/* [2] Keep an exemplar and recall it no more (retired = 1), or recall it again (0). */
RECALLSEG_API recallseg_status recallseg_library_retire(recallseg_library *library,
                                                        const char *key, int32_t retired);

/* [2] One exemplar of a list. Everything that it points to lives as long as the list. */
typedef struct recallseg_listed {
  uint32_t struct_size;
  int32_t retired;
  const char *key;
  const char *const *structures; /* that it shows */
  size_t structure_count;
  const char *const *absent; /* that it is known not to show */
  size_t absent_count;
  const recallseg_tag *tags;
  size_t tag_count;
  int64_t rows, columns; /* of its image */
  const char *created;   /* ISO 8601, UTC */
  const char *content;   /* SHA-256 of pixels, masks and absent structures */
  int32_t has_source;    /* whether image and masks were kept */
  int32_t reserved;
} recallseg_listed;
#define RECALLSEG_LISTED_INIT \
  {sizeof(recallseg_listed), 0, NULL, NULL, 0, NULL, 0, NULL, 0, 0, 0, NULL, NULL, 0, 0}

/* [2] All exemplars as they are now, in the order in which they were added, and after them those
 * that are retired. What happens to the library later does not change the list. */
RECALLSEG_API recallseg_status recallseg_library_list(recallseg_library *library,
                                                      recallseg_list **list);
RECALLSEG_API recallseg_status recallseg_list_count(recallseg_list *list, size_t *count);
RECALLSEG_API recallseg_status recallseg_list_exemplar(recallseg_list *list, size_t index,
                                                       recallseg_listed *exemplar);
RECALLSEG_API recallseg_status recallseg_list_close(recallseg_list *list);

/* Told how far something is, on the calling thread; must not throw. 0: go on; any other value: stop,
 * nothing is stored. */
typedef int32_t (*recallseg_progress_callback)(uint64_t done, uint64_t total, void *user);

/* [2] What was compared with its digest, and all that was wrong. */
typedef struct recallseg_verification {
  uint32_t struct_size;
  uint32_t reserved;
  uint64_t exemplars, memories, sources, indexes;
  uint64_t problem_count;
  const char *problems; /* a line each; "" if there are none. Until the next call for the library */
} recallseg_verification;
#define RECALLSEG_VERIFICATION_INIT \
  {sizeof(recallseg_verification), 0, 0, 0, 0, 0, 0, NULL}

/* [2] Read every byte of the library and compare it with its digest. RECALLSEG_E_LIBRARY_CORRUPT if
 * anything is wrong, and verification (may be null) then says all of it; it is filled with both.
 * progress may be null; stopped by it: RECALLSEG_E_STATE. */
RECALLSEG_API recallseg_status recallseg_library_verify(recallseg_library *library,
                                                        recallseg_progress_callback progress,
                                                        void *user,
                                                        recallseg_verification *verification);

/* ---- Audit log ---- */

/* [2] */
typedef struct recallseg_audit_options {
  uint32_t struct_size;
  uint32_t reserved;
  const char *key;  /* file of the key that seals every entry; null: none */
  const char *head; /* file, best in another place, that names the newest entry; null: none */
} recallseg_audit_options;
#define RECALLSEG_AUDIT_OPTIONS_INIT {sizeof(recallseg_audit_options), 0, NULL, NULL}

/* [2] Open an audit log, which is made if it is not there; what is there is checked first. Given to a
 * segmenter, every result of recallseg_segment and of its streams is an entry, on disk, before it is
 * handed over: docs/device/security.md. options may be null. A segmenter keeps the log open. */
RECALLSEG_API recallseg_status recallseg_audit_open(const char *file,
                                                    const recallseg_audit_options *options,
                                                    recallseg_audit **audit);
RECALLSEG_API recallseg_status recallseg_audit_close(recallseg_audit *audit);

/* ---- Segmenters ---- */

typedef struct recallseg_segmenter_options {
  uint32_t struct_size;
  int32_t k;                     /* exemplars to recall for each structure at most; 0: 4 */
  const char *const *structures; /* in the order of the label values; null: all */
  size_t structure_count;
  const char *engine;    /* null: "onnxruntime-cpu" */
  const char *precision; /* null: "fp32" */
  int32_t threads;       /* 0: all cores that this process may use */
  int32_t memories;      /* for streams: most memories of earlier frames, beside the k exemplars */
  const recallseg_tag *tags; /* recall only exemplars that carry all of these */
  size_t tag_count;
  double reach; /* of the k, recall those up to so many times as far as the nearest; 0: 3. INFINITY
                   recalls all k, so that every query takes the same time */
  recallseg_audit *audit; /* [2] null: none. RECALLSEG_E_AUDIT if an entry cannot be written: the
                             output is 0 then, and there is no result */
  const recallseg_gpu_options *gpu; /* [2] for an engine on a GPU; null: its defaults */
  /* [2] How the threads run that an engine on the CPU, and streams of this segmenter, make; it then
   * has a model of its own. Your own threads, which take part in a query, stay as they are. */
  const int32_t *cores; /* numbers of the cores; null: as the calling thread */
  size_t core_count;
  int32_t nice;         /* -20 (urgent) to 19; 0: as the calling thread */
  int32_t realtime;     /* 1 to 99: SCHED_FIFO with this priority; 0: none */
} recallseg_segmenter_options;
#define RECALLSEG_SEGMENTER_OPTIONS_INIT \
  {sizeof(recallseg_segmenter_options), 0, NULL, 0, NULL, NULL, 0, 0, NULL, 0, 0, NULL, NULL, NULL, 0, 0, 0}

RECALLSEG_API recallseg_status recallseg_segmenter_open(recallseg_library *library,
                                                        const recallseg_segmenter_options *options,
                                                        recallseg_segmenter **segmenter);
RECALLSEG_API recallseg_status recallseg_segmenter_structure_count(recallseg_segmenter *segmenter,
                                                                   size_t *count);
/* Structure `index` has the label value index + 1. */
RECALLSEG_API recallseg_status recallseg_segmenter_structure(recallseg_segmenter *segmenter,
                                                             size_t index, const char **name);
/* Run on a blank image, so that the first query is as fast as the next. */
RECALLSEG_API recallseg_status recallseg_segmenter_warm_up(recallseg_segmenter *segmenter,
                                                           int32_t runs);
/* Segment every exemplar from the others, and store in the library what is normal: from then on a
 * result's quality is OK or SUSPECT. It holds for this segmenter's settings and structures; what is
 * stored for others is kept. The library must be open for writing and have kept its images. Costs a
 * query for each exemplar; other threads' queries of this segmenter take turns with it. progress may
 * be null; stopped by it: RECALLSEG_E_STATE. */
RECALLSEG_API recallseg_status recallseg_segmenter_calibrate(recallseg_segmenter *segmenter,
                                                             recallseg_progress_callback progress,
                                                             void *user);

/* [2] */
enum {
  RECALLSEG_LEFT_OUT_EXEMPLARS = 0, /* one by itself: no groups are known */
  RECALLSEG_LEFT_OUT_GROUPS = 1,    /* all of its patient, series or volume */
  RECALLSEG_LEFT_OUT_BLOCKS = 2     /* a block of them: all are of one patient */
};

typedef struct recallseg_calibration {
  uint32_t struct_size;
  int32_t calibrated;  /* 0: too few exemplars; its quality stays UNCALIBRATED */
  uint64_t exemplars;  /* that were left out in turn and found */
  double distance;     /* largest usual cosine distance to the nearest exemplar */
  double iou;          /* least usual estimate; NaN if not calibrated */
  double dice;         /* median, of the left-out exemplars with their own masks; NaN if none */
  int32_t left_out;    /* [2] RECALLSEG_LEFT_OUT_...: what was left out at a time */
  int32_t reserved;
} recallseg_calibration;
#define RECALLSEG_CALIBRATION_INIT {sizeof(recallseg_calibration), 0, 0, 0, 0, 0, 0, 0}

/* Of one structure, what the last recallseg_segmenter_calibrate of this handle found;
 * RECALLSEG_E_STATE before the first. */
RECALLSEG_API recallseg_status
recallseg_segmenter_get_calibration(recallseg_segmenter *segmenter, size_t index,
                                    recallseg_calibration *calibration);
/* [2] End the calls of recallseg_segment and recallseg_segmenter_calibrate for this segmenter that
 * have begun, with RECALLSEG_E_CANCELLED, when the stage in work (of a calibration: the image) is
 * over; later calls and streams go on. Returns at once, waits for nothing. A call that is past its last stage ends as usual. */
RECALLSEG_API recallseg_status recallseg_segmenter_cancel(recallseg_segmenter *segmenter);
RECALLSEG_API recallseg_status recallseg_segmenter_close(recallseg_segmenter *segmenter);

/* Where results go: memory of the caller, never copied. */
typedef struct recallseg_output {
  uint32_t struct_size;
  uint32_t reserved;
  int64_t rows, columns;       /* as the image's */
  uint8_t *label_map;          /* rows x columns, or null; 0 is background. Where masks overlap, the
                                  structure with the highest logit has the pixel, the first of equals */
  int64_t label_strides[2];    /* as for images */
  uint8_t *masks;              /* count x rows x columns of 0 and 1, or null; these may overlap */
  int64_t mask_count;          /* the segmenter's structures */
  int64_t mask_strides[3];
  int32_t location;            /* [2] RECALLSEG_CUDA: label_map and masks are device pointers, packed.
                                  They are complete when the call returns */
  int32_t reserved2;
  void *stream;                /* [2] with RECALLSEG_CUDA: nothing is written before what is queued on
                                  this CUDA stream now is done; null: at once */
} recallseg_output;
#define RECALLSEG_OUTPUT_INIT \
  {sizeof(recallseg_output), 0, 0, 0, NULL, {0, 0}, NULL, 0, {0, 0, 0}, 0, 0, NULL}

/* Segment one image. deadline_ms: most milliseconds from this call to its return, waiting for
 * other threads included, looked at between stages; 0: none. result may be null. */
RECALLSEG_API recallseg_status recallseg_segment(recallseg_segmenter *segmenter,
                                                 const recallseg_image *image,
                                                 const recallseg_output *output,
                                                 double deadline_ms, recallseg_result **result);

/* ---- Results: everything but the pixels ---- */

typedef struct recallseg_summary {
  uint32_t struct_size;
  int32_t quality; /* RECALLSEG_QUALITY_... */
  size_t structure_count;
  size_t timing_count;
  double total_ms;
  const char *bundle_identity;
  const char *library_digest;
  const char *engine;
  const char *precision;
  const char *notice;
  int32_t k;
  int32_t reserved;
  const char *provenance; /* JSON: all that made the result, "provenance" of NAME.json */
  const char *provenance_digest; /* [2] SHA-256 over all of it: equal for results made alike */
  const char *mend; /* [2] what the quality lacks and the command that mends it; "" if nothing */
} recallseg_summary;
#define RECALLSEG_SUMMARY_INIT \
  {sizeof(recallseg_summary), 0, 0, 0, 0, NULL, NULL, NULL, NULL, NULL, 0, 0, NULL, NULL, NULL}

typedef struct recallseg_score {
  uint32_t struct_size;
  int32_t label; /* value in the label map */
  const char *structure;
  int32_t present;     /* whether a mask was given */
  int32_t reserved;
  double iou;          /* the model's own estimate, 0..1 */
  double object_score; /* logit that the structure is there */
  double distance;     /* cosine distance to the nearest exemplar that shows it */
  uint64_t pixels;     /* of the mask */
  double area_mm2;     /* NaN where the spacing is unknown */
  size_t recalled_count;
  size_t reason_count; /* why the quality is suspect */
  double presence;     /* [2] share of the recalled exemplars that show it, by nearness, 0..1 */
} recallseg_score;
#define RECALLSEG_SCORE_INIT {sizeof(recallseg_score), 0, NULL, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

typedef struct recallseg_recalled {
  uint32_t struct_size;
  int32_t absent;    /* 1: annotated as not showing the structure */
  const char *key;
  double similarity; /* cosine, -1..1 */
  size_t tag_count;
} recallseg_recalled;
#define RECALLSEG_RECALLED_INIT {sizeof(recallseg_recalled), 0, NULL, 0, 0}

RECALLSEG_API recallseg_status recallseg_result_summary(recallseg_result *result,
                                                        recallseg_summary *summary);
RECALLSEG_API recallseg_status recallseg_result_score(recallseg_result *result, size_t structure,
                                                      recallseg_score *score);
RECALLSEG_API recallseg_status recallseg_result_reason(recallseg_result *result, size_t structure,
                                                       size_t index, const char **reason);
/* Nearest first. */
RECALLSEG_API recallseg_status recallseg_result_recalled(recallseg_result *result,
                                                         size_t structure, size_t index,
                                                         recallseg_recalled *recalled);
RECALLSEG_API recallseg_status recallseg_result_tag(recallseg_result *result, size_t structure,
                                                    size_t recalled, size_t index,
                                                    recallseg_tag *tag);
/* Stages in the order in which they ran. */
RECALLSEG_API recallseg_status recallseg_result_timing(recallseg_result *result, size_t index,
                                                       const char **stage, double *ms);
RECALLSEG_API recallseg_status recallseg_result_close(recallseg_result *result);

/* ---- Streams: live frames that must not be late ---- */

/* What became of one frame. All of it is valid until the callback returns, and no longer. */
typedef struct recallseg_frame {
  uint32_t struct_size;
  recallseg_status status;  /* RECALLSEG_E_DEADLINE: late */
  uint64_t number;          /* as recallseg_stream_push gave it; numbers left out were dropped */
  double waited_ms;         /* from the push to the beginning of the work */
  double latency_ms;        /* from the push to its end */
  int64_t rows, columns;
  const uint8_t *label_map; /* packed rows; null if status is not RECALLSEG_OK */
  recallseg_result *result; /* to read, not to close; null likewise */
  const char *message;      /* why there is no result; "" if there is one */
} recallseg_frame;

/* Called on the stream's own thread, in order, for every frame that was not dropped. While it runs
 * no frame is segmented. Must not throw. It may call anything, recallseg_stream_close too. */
typedef void (*recallseg_frame_callback)(const recallseg_frame *frame, void *user);

typedef struct recallseg_stream_options {
  uint32_t struct_size;
  int32_t queue;      /* frames that may wait; the next one pushes the oldest out; 0: 1 */
  double deadline_ms; /* most milliseconds from push to result; 0: none */
} recallseg_stream_options;
#define RECALLSEG_STREAM_OPTIONS_INIT {sizeof(recallseg_stream_options), 0, 0}

typedef struct recallseg_stream_statistics {
  uint32_t struct_size;
  uint32_t reserved;
  uint64_t pushed; /* the sum of those that follow and of what still waits */
  uint64_t segmented;
  uint64_t dropped; /* pushed out of the queue by a newer frame */
  uint64_t late;
  uint64_t failed;
  uint64_t ignored; /* pushed while paused */
} recallseg_stream_statistics;
#define RECALLSEG_STREAM_STATISTICS_INIT \
  {sizeof(recallseg_stream_statistics), 0, 0, 0, 0, 0, 0, 0}

RECALLSEG_API recallseg_status recallseg_stream_open(recallseg_segmenter *segmenter,
                                                     const recallseg_stream_options *options,
                                                     recallseg_frame_callback callback, void *user,
                                                     recallseg_stream **stream);
/* Hand over a frame, which is copied, and return at once. number may be null. A frame on the GPU is
 * copied there. */
RECALLSEG_API recallseg_status recallseg_stream_push(recallseg_stream *stream,
                                                     const recallseg_image *image,
                                                     uint64_t *number);
/* Ignore what is pushed from now on; frames that wait are still segmented. */
RECALLSEG_API recallseg_status recallseg_stream_pause(recallseg_stream *stream);
/* Take frames again; earlier ones are forgotten. */
RECALLSEG_API recallseg_status recallseg_stream_resume(recallseg_stream *stream);
/* Forget the frames so far: what is pushed next belongs to another sequence. */
RECALLSEG_API recallseg_status recallseg_stream_restart(recallseg_stream *stream);
/* Wait until no frame waits or is in work; RECALLSEG_E_DEADLINE after timeout_ms. */
RECALLSEG_API recallseg_status recallseg_stream_drain(recallseg_stream *stream, double timeout_ms);
RECALLSEG_API recallseg_status
recallseg_stream_get_statistics(recallseg_stream *stream, recallseg_stream_statistics *statistics);
/* Drop what waits, let the frame in work end, and stop: the callback is not called any more once
 * this has returned, unless it is itself what called this. */
RECALLSEG_API recallseg_status recallseg_stream_close(recallseg_stream *stream);

#ifdef __cplusplus
}
#endif
#endif
