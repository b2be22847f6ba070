/* Counts the calls of libc that can change the disk, over all threads, and ends the process with SIGKILL right before the
   one it was told. Loaded with LD_PRELOAD by crash_calls.py; asleep until isft_arm() is called. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static atomic_long seen, at = -1;
static atomic_int armed;

void isft_arm(long when) { atomic_store(&seen, 0); atomic_store(&at, when); atomic_store(&armed, 1); }
long isft_seen(void) { return atomic_load(&seen); }

static void strike(void)
{
    if (atomic_load(&armed) && atomic_fetch_add(&seen, 1) == atomic_load(&at))
        for (;;)
            kill(getpid(), SIGKILL);
}

/* what goes to the terminal or a pipe changes no disk */
static void strike_file(int fd)
{
    struct stat found;
    if (atomic_load(&armed) && fstat(fd, &found) == 0 && (S_ISREG(found.st_mode) || S_ISDIR(found.st_mode)))
        strike();
}

#define FILE_CALL(result, name, declared, passed) \
    result name declared \
    { \
        static result(*real) declared; \
        if (!real) \
            real = dlsym(RTLD_NEXT, #name); \
        strike_file(fd); \
        return real passed; \
    }
#define PATH_CALL(result, name, declared, passed) \
    result name declared \
    { \
        static result(*real) declared; \
        if (!real) \
            real = dlsym(RTLD_NEXT, #name); \
        strike(); \
        return real passed; \
    }

FILE_CALL(ssize_t, write, (int fd, const void *data, size_t size), (fd, data, size))
FILE_CALL(ssize_t, writev, (int fd, const struct iovec *parts, int count), (fd, parts, count))
FILE_CALL(ssize_t, pwrite, (int fd, const void *data, size_t size, off_t place), (fd, data, size, place))
FILE_CALL(ssize_t, pwrite64, (int fd, const void *data, size_t size, off64_t place), (fd, data, size, place))
FILE_CALL(int, fsync, (int fd), (fd))
FILE_CALL(int, fdatasync, (int fd), (fd))
FILE_CALL(int, ftruncate, (int fd, off_t size), (fd, size))
FILE_CALL(int, ftruncate64, (int fd, off64_t size), (fd, size))
FILE_CALL(int, fchmod, (int fd, mode_t mode), (fd, mode))
PATH_CALL(int, truncate, (const char *path, off_t size), (path, size))
PATH_CALL(int, rename, (const char *from, const char *to), (from, to))
PATH_CALL(int, renameat, (int a, const char *from, int b, const char *to), (a, from, b, to))
PATH_CALL(int, mkdir, (const char *path, mode_t mode), (path, mode))
PATH_CALL(int, unlink, (const char *path), (path))
PATH_CALL(int, unlinkat, (int folder, const char *path, int flags), (folder, path, flags))
PATH_CALL(int, rmdir, (const char *path), (path))
PATH_CALL(int, chmod, (const char *path, mode_t mode), (path, mode))
PATH_CALL(int, fchmodat, (int folder, const char *path, mode_t mode, int flags), (folder, path, mode, flags))

#define OPEN_CALL(name, declared, passed) \
    int name declared \
    { \
        static int(*real) declared; \
        mode_t mode = 0; \
        if (!real) \
            real = dlsym(RTLD_NEXT, #name); \
        if (flags & (O_CREAT | O_TRUNC)) { \
            va_list rest; \
            va_start(rest, flags); \
            mode = va_arg(rest, mode_t); \
            va_end(rest); \
            strike(); \
        } \
        return real passed; \
    }

OPEN_CALL(open, (const char *path, int flags, ...), (path, flags, mode))
OPEN_CALL(open64, (const char *path, int flags, ...), (path, flags, mode))
OPEN_CALL(openat, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
OPEN_CALL(openat64, (int folder, const char *path, int flags, ...), (folder, path, flags, mode))
