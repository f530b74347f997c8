/* Reading memory maps of files that may be truncated, replaced or unmounted meanwhile.
 *
 * The system then sends SIGBUS to the thread that reads. Between guard_begin and guard_end such a thread jumps
 * back to where its guard began; any other thread gets the handler that was there before.
 */

#ifndef ZPATCH_GUARD_H
#define ZPATCH_GUARD_H

#include <setjmp.h>
#include <signal.h>
#include <string.h>

static _Thread_local sigjmp_buf *guarded; /* where this thread goes on, or NULL */
static _Thread_local int passed_on;       /* whether a signal of this thread was given to the handler before */
static struct sigaction before_guard;

static void on_bus_error(int number, siginfo_t *info, void *context)
{
    if (guarded)
        siglongjmp(*guarded, 1);
    struct sigaction before = before_guard;
    int is_default = !(before.sa_flags & SA_SIGINFO) &&
                     (before.sa_handler == SIG_DFL || before.sa_handler == SIG_IGN);
    if (is_default || passed_on) { /* the read is tried again, and ends the process */
        struct sigaction plain;
        memset(&plain, 0, sizeof plain);
        plain.sa_handler = SIG_DFL;
        sigaction(number, &plain, NULL);
        return;
    }
    passed_on = 1; /* once: some handlers raise the signal again */
    if (before.sa_flags & SA_SIGINFO)
        before.sa_sigaction(number, info, context);
    else
        before.sa_handler(number);
    passed_on = 0;
}

/* Others, such as torch's loaders, set handlers of their own at any time: so it is looked at each time. */
static void guard_begin(sigjmp_buf *place)
{
    struct sigaction now;
    if (!sigaction(SIGBUS, NULL, &now) &&
        !((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == on_bus_error)) {
        struct sigaction ours;
        memset(&ours, 0, sizeof ours);
        ours.sa_sigaction = on_bus_error;
        ours.sa_flags = SA_SIGINFO | SA_NODEFER;
        before_guard = now;
        sigaction(SIGBUS, &ours, NULL);
    }
    guarded = place;
}

static void guard_end(void)
{
    guarded = NULL;
}

#endif
