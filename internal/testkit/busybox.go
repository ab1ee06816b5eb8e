package testkit

import (
	"crypto/sha256"
	"encoding/hex"
	"os"
	"os/exec"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// busyboxBinary is where Debian's busybox-static puts its one file.
const busyboxBinary = "/bin/busybox"

// Busybox is a small system that runs: one gzip layer with a static busybox,
// a link for each applet, and the files that programs expect in /etc.
func Busybox(t testing.TB) Image {
	t.Helper()
	img, err := MakeBusybox()
	return must(t, img, err)
}

// MakeBusybox is [Busybox] outside tests.
func MakeBusybox() (Image, error) {
	if err := need(busyboxBinary, "busybox-static"); err != nil {
		return Image{}, err
	}
	list, err := exec.Command(busyboxBinary, "--list").Output()
	if err != nil {
		return Image{}, err
	}
	return busyboxWith("busybox", strings.Fields(string(list)))
}

// FewApplets is [Busybox] with links for these applets only: an image that runs
// and has few files.
func FewApplets(t testing.TB, applets ...string) Image {
	t.Helper()
	img, err := busyboxWith("few-applets", applets)
	return must(t, img, err)
}

func busyboxWith(name string, applets []string) (Image, error) {
	if err := need(busyboxBinary, "busybox-static"); err != nil {
		return Image{}, err
	}
	binary, err := os.ReadFile(busyboxBinary)
	if err != nil {
		return Image{}, err
	}
	sum := sha256.Sum256(binary)
	return cached(name, append([]string{"1", hex.EncodeToString(sum[:])}, applets...), func(l *Layout) (Image, error) {
		layer, err := l.AddLayer(Gzip, "ADD busybox /", func(b *LayerBuilder) { fillBusybox(b, binary, applets) })
		if err != nil {
			return Image{}, err
		}
		manifest, err := l.AddImage(ocispec.ImageConfig{
			Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
			Cmd: []string{"sh"},
		}, layer)
		if err != nil {
			return Image{}, err
		}
		return l.Finish("busybox:latest", manifest)
	})
}

func fillBusybox(b *LayerBuilder, binary []byte, applets []string) {
	for _, dir := range []string{"bin", "dev", "etc", "home", "proc", "sys", "usr", "usr/bin", "usr/sbin", "var", "var/log"} {
		b.Dir(dir, 0o755)
	}
	b.Dir("root", 0o700)
	b.Dir("tmp", 0o1777)
	b.Dir("var/tmp", 0o1777)
	b.Symlink("sbin", "usr/sbin")
	b.File("bin/busybox", 0o755, binary)
	for _, applet := range applets {
		if applet != "busybox" {
			b.Symlink("bin/"+applet, "busybox")
		}
	}
	b.Symlink("usr/bin/env", "../../bin/busybox")
	b.Text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\nuser:x:1000:1000:user:/home/user:/bin/sh\n")
	b.Text("etc/group", "root:x:0:\nnogroup:x:65534:\nuser:x:1000:\nextra:x:2000:user\n")
	b.File("etc/shadow", 0o640, []byte("root:*:::::::\nuser:*:::::::\n"))
	b.Text("etc/nsswitch.conf", "hosts: files dns\n")
	b.Dir("home/user", 0o755, Owner(1000, 1000))
}
