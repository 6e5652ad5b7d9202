/* Lets calls to the system fail, or writes down what they changed, for paths below one folder.

   Loaded with LD_PRELOAD before anything else, so that what Python, SQLite, USearch and ONNX Runtime
   call comes through here. Does nothing until it is told to by one of the four functions at the end. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

enum {
  OPEN = 1, READ = 2, WRITE = 4, SYNC = 8, RENAME = 16,
  UNLINK = 32, MKDIR = 64, MAP = 128, TRUNCATE = 256,
  COPY = 512, SYMLINK = 1024, LIST = 2048, STAT = 4096,
};
enum {
  SHORT = -1,    /* instead of an errno: do half of what is asked for */
  SIGNALS = -100 /* and less: before the call the process gets the signal of the number below that */
};

static char root[PATH_MAX];
static size_t root_length;
static unsigned classes;         /* which calls count */
static long at, count;           /* the call that fails, and how many there were */
static long counts[32];          /* and of each kind, by its bit */
static int error, lasting;       /* what it fails with, and whether all after it do too */
static long fired;
static int record = -1;          /* descriptor of the log of changes */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

#define REAL(name) \
  static __typeof__(name) *real; \
  if (!real) real = (__typeof__(name) *)dlsym(RTLD_NEXT, #name)

/* The path behind a descriptor; empty where there is none. */
static const char *path_of(int fd, char *into) {
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t length = readlink(link, into, PATH_MAX - 1);
  into[length < 0 ? 0 : length] = 0;
  return into;
}

static const char *path_at(int folder, const char *name, char *into) {
  if (name[0] == '/') return name;
  char base[PATH_MAX];
  if (folder == AT_FDCWD) {
    if (!getcwd(base, sizeof base)) base[0] = 0;
  } else {
    path_of(folder, base);
  }
  if (snprintf(into, PATH_MAX, "%s/%s", base, name) >= PATH_MAX) into[0] = 0;
  return into;
}

static int inside(const char *path) {
  return root_length && !strncmp(path, root, root_length) &&
         (path[root_length] == '/' || !path[root_length]);
}

/* Whether this call fails: 0 no, 1 yes (errno is set), 2 do half of it. */
static int fails(unsigned kind, const char *path) {
  if (!(classes & kind) || !inside(path)) return 0;
  pthread_mutex_lock(&lock);
  long number = ++count;
  counts[__builtin_ctz(kind)]++;
  int now = at && (number == at || (lasting && number > at));
  fired += now;
  pthread_mutex_unlock(&lock);
  if (!now) return 0;
  if (error == SHORT) return 2;
  if (error <= SIGNALS) {
    kill(getpid(), SIGNALS - error);
    return 0;
  }
  errno = error;
  return 1;
}

/* One entry of the log: kind, offset, lengths of two texts, the texts. Native byte order. */
static void note(char kind, const char *path, int64_t offset, const void *data, size_t size) {
  if (record < 0 || !inside(path)) return;
  int before = errno;
  struct { int64_t offset; uint64_t size; uint32_t path; char kind; char pad[3]; } entry = {
      offset, size, (uint32_t)strlen(path), kind, {0}};
  REAL(write);
  pthread_mutex_lock(&lock);
  if (real(record, &entry, sizeof entry) < 0 || real(record, path, entry.path) < 0 ||
      (size && real(record, data, size) < 0))
    record = -1;
  pthread_mutex_unlock(&lock);
  errno = before;
}

static void note_open(const char *path, int flags, int existed) {
  if (!(flags & (O_WRONLY | O_RDWR)) ) return;
  if (!existed) note('c', path, 0, 0, 0);
  if (flags & O_TRUNC) note('t', path, 0, 0, 0);
}

static int exists(const char *path) {
  struct stat found;
  return record < 0 || !lstat(path, &found);
}

#define OPENAT(name) \
  int name(int folder, const char *file, int flags, ...) { \
    REAL(name); \
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
    char room[PATH_MAX]; const char *path = path_at(folder, file, room); \
    if (fails(OPEN, path) == 1) return -1; \
    int there = exists(path), fd = real(folder, file, flags, mode); \
    if (fd >= 0) note_open(path, flags, there); \
    return fd; \
  }
OPENAT(openat)
OPENAT(openat64)

#define OPEN_(name) \
  int name(const char *file, int flags, ...) { \
    REAL(name); \
    va_list more; va_start(more, flags); mode_t mode = va_arg(more, mode_t); va_end(more); \
    char room[PATH_MAX]; const char *path = path_at(AT_FDCWD, file, room); \
    if (fails(OPEN, path) == 1) return -1; \
    int there = exists(path), fd = real(file, flags, mode); \
    if (fd >= 0) note_open(path, flags, there); \
    return fd; \
  }
OPEN_(open)
OPEN_(open64)

#define FOPEN(name) \
  FILE *name(const char *file, const char *mode) { \
    REAL(name); \
    char room[PATH_MAX]; const char *path = path_at(AT_FDCWD, file, room); \
    if (fails(OPEN, path) == 1) return NULL; \
    int there = exists(path); FILE *made = real(file, mode); \
    if (made && mode[0] != 'r') note_open(path, O_WRONLY | O_TRUNC, there); \
    return made; \
  }
FOPEN(fopen)
FOPEN(fopen64)

#define READING(name, parameters, values) \
  ssize_t name parameters { \
    REAL(name); \
    char room[PATH_MAX]; \
    int how = classes & READ ? fails(READ, path_of(fd, room)) : 0; \
    if (how == 1) return -1; \
    if (how == 2 && size > 1) size /= 2; \
    return real values; \
  }
READING(read, (int fd, void *data, size_t size), (fd, data, size))
READING(pread, (int fd, void *data, size_t size, off_t offset), (fd, data, size, offset))
READING(pread64, (int fd, void *data, size_t size, off64_t offset), (fd, data, size, offset))

#define WRITING(name, parameters, values, place) \
  ssize_t name parameters { \
    REAL(name); \
    if (!(classes & WRITE) && record < 0) return real values; \
    char room[PATH_MAX]; const char *path = path_of(fd, room); \
    int how = fails(WRITE, path); \
    if (how == 1) return -1; \
    if (how == 2 && size > 1) size /= 2; \
    int64_t start = place; \
    ssize_t done = real values; \
    if (done > 0) note('w', path, start, data, (size_t)done); \
    return done; \
  }
WRITING(write, (int fd, const void *data, size_t size), (fd, data, size), lseek(fd, 0, SEEK_CUR))
WRITING(pwrite, (int fd, const void *data, size_t size, off_t offset), (fd, data, size, offset), offset)
WRITING(pwrite64, (int fd, const void *data, size_t size, off64_t offset), (fd, data, size, offset), offset)

/* What is recorded goes through write: whoever copies so is told that it cannot be done here. */
#define COPYING(name, type) \
  ssize_t name(int into, int from, type *offset, size_t size) { \
    REAL(name); \
    if (!(classes & COPY) && record < 0) return real(into, from, offset, size); \
    char room[PATH_MAX]; const char *path = path_of(into, room); \
    if (record >= 0 && inside(path)) { errno = EINVAL; return -1; } \
    int how = fails(COPY, path); \
    if (how == 1) return -1; \
    if (how == 2 && size > 1) size /= 2; \
    return real(into, from, offset, size); \
  }
COPYING(sendfile, off_t)
COPYING(sendfile64, off64_t)

size_t fwrite(const void *data, size_t size, size_t members, FILE *file) {
  REAL(fwrite);
  if (!(classes & WRITE) && record < 0) return real(data, size, members, file);
  char room[PATH_MAX];
  const char *path = path_of(fileno(file), room);
  int how = fails(WRITE, path);
  if (how == 1) return 0;
  if (how == 2) members /= 2;
  int64_t start = record < 0 ? 0 : ftello(file);
  size_t done = real(data, size, members, file);
  if (done) note('w', path, start, data, done * size);
  return done;
}

/* A flush that fails loses what was not written yet. */
int fclose(FILE *file) {
  REAL(fclose);
  char room[PATH_MAX];
  struct stat before = {0};
  int how = 0;
  if (classes & WRITE) {
    fstat(fileno(file), &before);
    how = fails(WRITE, path_of(fileno(file), room));
  }
  int done = real(file);
  if (how != 1) return done;
  if (truncate(room, before.st_size)) return EOF;
  errno = error;
  return EOF;
}

#define SYNCING(name) \
  int name(int fd) { \
    REAL(name); \
    if (!(classes & SYNC) && record < 0) return real(fd); \
    char room[PATH_MAX]; const char *path = path_of(fd, room); \
    if (fails(SYNC, path) == 1) return -1; \
    int done = real(fd); \
    if (!done) note('s', path, 0, 0, 0); \
    return done; \
  }
SYNCING(fsync)
SYNCING(fdatasync)

static int renamed(const char *from, const char *to, int done) {
  if (!done) note('r', from, 0, to, strlen(to));
  return done;
}

int rename(const char *from, const char *to) {
  REAL(rename);
  char a[PATH_MAX], b[PATH_MAX];
  const char *target = path_at(AT_FDCWD, to, b);
  if (fails(RENAME, target) == 1) return -1;
  return renamed(path_at(AT_FDCWD, from, a), target, real(from, to));
}

int renameat(int one, const char *from, int other, const char *to) {
  REAL(renameat);
  char a[PATH_MAX], b[PATH_MAX];
  const char *target = path_at(other, to, b);
  if (fails(RENAME, target) == 1) return -1;
  return renamed(path_at(one, from, a), target, real(one, from, other, to));
}

int link(const char *from, const char *to) {
  REAL(link);
  char a[PATH_MAX], b[PATH_MAX];
  const char *target = path_at(AT_FDCWD, to, b);
  if (fails(RENAME, target) == 1) return -1;
  int done = real(from, to);
  if (!done) note('l', path_at(AT_FDCWD, from, a), 0, target, strlen(target));
  return done;
}

int symlink(const char *to, const char *file) {
  REAL(symlink);
  char room[PATH_MAX];
  if (fails(SYMLINK, path_at(AT_FDCWD, file, room)) == 1) return -1;
  return real(to, file);
}

int symlinkat(const char *to, int folder, const char *file) {
  REAL(symlinkat);
  char room[PATH_MAX];
  if (fails(SYMLINK, path_at(folder, file, room)) == 1) return -1;
  return real(to, folder, file);
}

int unlink(const char *file) {
  REAL(unlink);
  char room[PATH_MAX]; const char *path = path_at(AT_FDCWD, file, room);
  if (fails(UNLINK, path) == 1) return -1;
  int done = real(file);
  if (!done) note('u', path, 0, 0, 0);
  return done;
}

int unlinkat(int folder, const char *file, int flags) {
  REAL(unlinkat);
  char room[PATH_MAX]; const char *path = path_at(folder, file, room);
  if (fails(UNLINK, path) == 1) return -1;
  int done = real(folder, file, flags);
  if (!done) note('u', path, 0, 0, 0);
  return done;
}

int rmdir(const char *file) {
  REAL(rmdir);
  char room[PATH_MAX]; const char *path = path_at(AT_FDCWD, file, room);
  if (fails(UNLINK, path) == 1) return -1;
  int done = real(file);
  if (!done) note('u', path, 0, 0, 0);
  return done;
}

int mkdirat(int folder, const char *file, mode_t mode) {
  REAL(mkdirat);
  char room[PATH_MAX]; const char *path = path_at(folder, file, room);
  if (fails(MKDIR, path) == 1) return -1;
  int done = real(folder, file, mode);
  if (!done) note('d', path, 0, 0, 0);
  return done;
}

int mkdir(const char *file, mode_t mode) {
  REAL(mkdir);
  char room[PATH_MAX]; const char *path = path_at(AT_FDCWD, file, room);
  if (fails(MKDIR, path) == 1) return -1;
  int done = real(file, mode);
  if (!done) note('d', path, 0, 0, 0);
  return done;
}

DIR *opendir(const char *file) {
  REAL(opendir);
  char room[PATH_MAX];
  if ((classes & LIST) && fails(LIST, path_at(AT_FDCWD, file, room)) == 1) return NULL;
  return real(file);
}

#define LISTING(name, type) \
  struct type *name(DIR *folder) { \
    REAL(name); \
    char room[PATH_MAX]; \
    if ((classes & LIST) && fails(LIST, path_of(dirfd(folder), room)) == 1) return NULL; \
    return real(folder); \
  }
LISTING(readdir, dirent)
LISTING(readdir64, dirent64)

#define LOOKING(name, type, folder, parameters, values) \
  int name parameters { \
    REAL(name); \
    char room[PATH_MAX]; \
    if ((classes & STAT) && fails(STAT, path_at(folder, file, room)) == 1) return -1; \
    return real values; \
  }
#define LOOKING_AT_ALL(stat, lstat, fstatat, type) \
  LOOKING(stat, type, AT_FDCWD, (const char *file, struct type *found), (file, found)) \
  LOOKING(lstat, type, AT_FDCWD, (const char *file, struct type *found), (file, found)) \
  LOOKING(fstatat, type, at_folder, \
          (int at_folder, const char *file, struct type *found, int flags), \
          (at_folder, file, found, flags))
LOOKING_AT_ALL(stat, lstat, fstatat, stat)
LOOKING_AT_ALL(stat64, lstat64, fstatat64, stat64)

#define MAPPING(name, type) \
  void *name(void *where, size_t size, int protection, int flags, int fd, type offset) { \
    REAL(name); \
    if (fd >= 0 && (classes & MAP)) { \
      char room[PATH_MAX]; \
      if (fails(MAP, path_of(fd, room)) == 1) return MAP_FAILED; \
    } \
    return real(where, size, protection, flags, fd, offset); \
  }
MAPPING(mmap, off_t)
MAPPING(mmap64, off64_t)

#define TRUNCATING(name, type) \
  int name(int fd, type size) { \
    REAL(name); \
    if (!(classes & TRUNCATE) && record < 0) return real(fd, size); \
    char room[PATH_MAX]; const char *path = path_of(fd, room); \
    if (fails(TRUNCATE, path) == 1) return -1; \
    int done = real(fd, size); \
    if (!done) note('t', path, size, 0, 0); \
    return done; \
  }
TRUNCATING(ftruncate, off_t)
TRUNCATING(ftruncate64, off64_t)

#define ALLOCATING(name, type) \
  int name(int fd, type offset, type size) { \
    REAL(name); \
    if (!(classes & TRUNCATE) && record < 0) return real(fd, offset, size); \
    char room[PATH_MAX]; const char *path = path_of(fd, room); \
    if (fails(TRUNCATE, path) == 1) return errno; \
    int done = real(fd, offset, size); \
    if (!done) note('a', path, offset + size, 0, 0); \
    return done; \
  }
ALLOCATING(posix_fallocate, off_t)
ALLOCATING(posix_fallocate64, off64_t)

/* Count calls of these kinds below a folder; the n-th fails (0: none). */
void faults_arm(const char *folder, unsigned kinds, long number, int code, int stays) {
  snprintf(root, sizeof root, "%s", folder);
  root_length = strlen(root);
  at = number; error = code; lasting = stays; count = fired = 0;
  memset(counts, 0, sizeof counts);
  classes = kinds;
}

void faults_disarm(void) { classes = 0; }

/* How many calls of these kinds counted since the last faults_arm. */
long faults_counted(unsigned kinds) {
  long sum = 0;
  for (int bit = 0; bit < 32; bit++) sum += kinds >> bit & 1 ? counts[bit] : 0;
  return sum;
}

/* How many calls failed since the last faults_arm. */
long faults_fired(void) { return fired; }

static long jumps; /* seconds by which the time of day may be off at any look at it; 0: none */
static unsigned long looks;

/* Let the time of day jump back and forth, by less than so many seconds. */
void faults_clock(long most) { jumps = most; }

static long off(void) {
  if (!jumps) return 0;
  unsigned long number = __sync_add_and_fetch(&looks, 1) * 6364136223846793005ul;
  return (long)((number >> 16) % (2 * (unsigned long)jumps)) - jumps;
}

int clock_gettime(clockid_t clock, struct timespec *now) {
  REAL(clock_gettime);
  int done = real(clock, now);
  if (!done && clock == CLOCK_REALTIME) now->tv_sec += off();
  return done;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone) {
  static int (*real)(struct timeval *, void *);
  if (!real) real = (int (*)(struct timeval *, void *))dlsym(RTLD_NEXT, "gettimeofday");
  int done = real(now, zone);
  if (!done) now->tv_sec += off();
  return done;
}

time_t time(time_t *into) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  if (into) *into = now.tv_sec;
  return now.tv_sec;
}

/* Write what changes below a folder into a descriptor; -1 ends it. */
void faults_record(const char *folder, int into) {
  snprintf(root, sizeof root, "%s", folder);
  root_length = strlen(root);
  record = into;
}
