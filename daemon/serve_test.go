package daemon

import (
	"errors"
	"net"
	"path/filepath"
	"testing"
	"time"

	"varve.dev/errdefs"
)

// A socket is not taken from who answers on it, but from who is about to end.
func TestListenUnix(t *testing.T) {
	path := filepath.Join(t.TempDir(), "socket")
	other, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	if err != nil {
		t.Fatal(err)
	}
	other.SetUnlinkOnClose(false)
	if l, err := listenUnix(path); !errors.Is(err, errdefs.ErrUnavailable) {
		t.Errorf("taken from who answers: %v, %v", l, err)
	}
	time.AfterFunc(dyingWait/5, func() { other.Close() })
	l, err := listenUnix(path)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", path)
	if err == nil {
		err = errors.Join(conn.Close(), l.Close())
	}
	if err != nil {
		t.Error(err)
	}
}
