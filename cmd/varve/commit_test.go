package main

import (
	"strings"
	"testing"
	"time"
)

// A container's changes become an image: what it wrote, what it removed.
// The container stays and can be committed
// again.
func TestCommit(t *testing.T) {
	h := newHost(t)
	base := busybox(t)
	h.run("run", "--name", "worker", base, "sh", "-c",
		"echo data >/new; ln /new /same; rm /bin/vi; rm -r /var; mkdir /var; echo x >/var/x; chmod 700 /tmp; mkfifo /tmp/pipe")
	id := strings.TrimSpace(h.run("commit", "-m", "a note", "-a", "somebody", "worker", "made:1"))
	if !strings.HasPrefix(id, "sha256:") {
		t.Errorf("commit printed %q", id)
	}
	look := "cat /new /var/x; stat -c %h /same; test -e /bin/vi || echo gone; ls -a /var; stat -c %a /tmp; ls -l /tmp | cut -c1-10"
	want := "data\nx\n2\ngone\n.\n..\nx\n700\ntotal 0\nprw-r--r--\n"
	if got := h.run("run", "--rm", "made:1", "sh", "-c", look); got != want {
		t.Errorf("in the image: %q, want %q", got, want)
	}
	if got := h.run("history", "--no-trunc", "made:1"); !strings.Contains(got, "a note") || !strings.Contains(got, "echo data >/new") {
		t.Errorf("history:\n%s", got)
	}
	if again := strings.TrimSpace(h.run("commit", "worker")); again == "" || again == id {
		t.Errorf("committed again: %q", again) // by the time in its history
	}
	// As an image that came from elsewhere, too.
	pushed := strings.TrimSuffix(base, "busybox:latest") + "made:1"
	h.run("tag", "made:1", pushed)
	h.run("push", "--plain-http", pushed)
	other := newHost(t)
	other.run("pull", "--plain-http", pushed)
	if got := other.run("run", "--rm", pushed, "sh", "-c", look); got != want {
		t.Errorf("pulled: %q, want %q", got, want)
	}

	for what, args := range map[string][]string{
		`container "nobody"`: {"commit", "nobody", "x:1"},
		"invalid reference":  {"commit", "worker", "NOT A NAME"},
	} {
		if out, code := h.try(args...); code != 1 || !strings.Contains(out, what) {
			t.Errorf("%v: exit code %d, %q", args, code, out)
		}
	}
	running := h.command("run", "--name", "busy", base, "sleep", "5")
	if err := running.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		out, code := h.try("commit", "busy")
		if code == 1 && strings.Contains(out, "is running") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("a running container: exit code %d, %q", code, out)
		}
	}
	if err := running.Wait(); err != nil {
		t.Error(err)
	}
}
