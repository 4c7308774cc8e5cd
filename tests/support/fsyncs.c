/* Preloaded into a daemon and its QEMUs: keeps what would be on the disk after a power cut.
 *
 * At every fsync and fdatasync below STRATABOX_FSYNC_ROOT that succeeds, the file's bytes, or the
 * folder's entries, are copied to STRATABOX_FSYNC_SHADOW before the caller goes on:
 *
 *   files/KEY      bytes and mode      folders/KEY    "TYPE KEY NAME\n" for each entry
 *
 * KEY is the inode's number and time of birth, so that a number that is used again is another one.
 * What was never synced has nothing there: after the cut the file is empty, the folder too.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define PORTION (1 << 16)

static const char *shadow;

static int key_of(int folder, const char *name, char *key, size_t size, struct statx *found)
{
    int flags = AT_SYMLINK_NOFOLLOW | (*name ? 0 : AT_EMPTY_PATH);
    if (statx(folder, name, flags, STATX_BASIC_STATS | STATX_BTIME, found))
        return -1;
    snprintf(key, size, "%llu-%lld-%u", (unsigned long long)found->stx_ino,
             (long long)found->stx_btime.tv_sec, found->stx_btime.tv_nsec);
    return 0;
}

static void give_up(const char *what)
{
    fprintf(stderr, "fsyncs: %s: %s\n", what, strerror(errno));
    abort(); /* a test must not go on with a copy that lacks something */
}

static void save_file(int descriptor, int target, off_t size)
{
    static const char zeros[PORTION];
    char buffer[PORTION];
    int reading = descriptor;
    if ((fcntl(descriptor, F_GETFL) & O_ACCMODE) == O_WRONLY) {
        char path[64];
        snprintf(path, sizeof path, "/proc/self/fd/%d", descriptor);
        reading = open(path, O_RDONLY | O_CLOEXEC);
        if (reading < 0)
            give_up("reopen");
    }
    for (off_t at = 0; at < size;) {
        ssize_t count = pread(reading, buffer, PORTION, at);
        if (count < 0)
            give_up("read");
        if (count == 0)
            break;
        if (memcmp(buffer, zeros, count) && pwrite(target, buffer, count, at) != count)
            give_up("write");
        at += count;
    }
    if (ftruncate(target, size))
        give_up("truncate");
    if (reading != descriptor)
        close(reading);
}

static void save_folder(int descriptor, int target)
{
    int again = openat(descriptor, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    DIR *folder = again < 0 ? NULL : fdopendir(again);
    struct dirent *entry;
    if (!folder)
        give_up("folder");
    while ((entry = readdir(folder))) {
        char key[128];
        struct statx found;
        if (!strcmp(entry->d_name, ".") || !strcmp(entry->d_name, ".."))
            continue;
        if (key_of(again, entry->d_name, key, sizeof key, &found))
            continue; /* gone meanwhile: it may be missing after the cut, too */
        dprintf(target, "%c %s %s\n",
                S_ISDIR(found.stx_mode) ? 'd' : S_ISREG(found.stx_mode) ? 'f' : '-', key,
                entry->d_name);
    }
    closedir(folder);
}

static int keep(int descriptor, const char *name)
{
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, name);
    const char *root = getenv("STRATABOX_FSYNC_ROOT");
    char link[64], path[4096], key[128], lock[4600], final[4600], part[4700];
    struct statx found;
    shadow = getenv("STRATABOX_FSYNC_SHADOW");
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (!root || !shadow || length < 0)
        return real(descriptor);
    path[length] = 0;
    if (strncmp(path, root, strlen(root)) || (path[strlen(root)] && path[strlen(root)] != '/'))
        return real(descriptor);
    if (key_of(descriptor, "", key, sizeof key, &found))
        give_up("statx");
    int is_folder = S_ISDIR(found.stx_mode);
    /* One at a time for each file: or an older copy could take the place of a newer one. */
    snprintf(lock, sizeof lock, "%s/locks/%s", shadow, key);
    int holding = open(lock, O_RDONLY | O_CREAT | O_CLOEXEC, 0644);
    if (holding < 0 || flock(holding, LOCK_EX))
        give_up("lock");
    int result = real(descriptor), error = errno;
    if (!result) {
        struct stat now, before;
        snprintf(final, sizeof final, "%s/%s/%s", shadow, is_folder ? "folders" : "files", key);
        snprintf(part, sizeof part, "%s/parts/%s.%ld", shadow, key, syscall(SYS_gettid));
        int target = open(part, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
        if (target < 0 || fstat(descriptor, &now))
            give_up("open");
        if (is_folder)
            save_folder(descriptor, target);
        else
            save_file(descriptor, target, now.st_size);
        /* fdatasync takes the bytes and the size along, and the mode need not be. */
        mode_t mode = now.st_mode & 07777;
        if (!strcmp(name, "fdatasync") && !stat(final, &before))
            mode = before.st_mode & 07777;
        if (fchmod(target, mode) || rename(part, final))
            give_up("rename");
        close(target);
    }
    close(holding);
    errno = error;
    return result;
}

int fsync(int descriptor)
{
    return keep(descriptor, "fsync");
}

int fdatasync(int descriptor)
{
    return keep(descriptor, "fdatasync");
}
