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
	return busyboxWith("busybox", strings.Fields(string(list)), nil)
}

// MakeAlike is a busybox with the users and groups of the image of that name,
// and with the files by which programs know Alpine if alpine is set: for tests
// that were written for those images and need no more of them.
func MakeAlike(alpine bool) (Image, error) {
	list, err := exec.Command(busyboxBinary, "--list").Output()
	if err != nil {
		return Image{}, err
	}
	name := "busybox-alike"
	if alpine {
		name = "alpine-alike"
	}
	return busyboxWith(name, strings.Fields(string(list)), func(b *LayerBuilder) {
		b.File("bin/adduser", 0o755, []byte(adduser))
		b.File("bin/addgroup", 0o755, []byte(addgroup))
		if alpine {
			b.Text("etc/alpine-release", "3.18.0\n")
			b.Text("etc/os-release", "NAME=\"Alpine Linux\"\nID=alpine\nVERSION_ID=3.18.0\n")
		}
	})
}

// What Debian's busybox lacks of those images' one: enough for
// "adduser -D [-u UID] [-G GROUP] NAME" and "addgroup [-g GID] NAME".
const (
	adduser = `#!/bin/sh
set -e
uid=1000 group=
while getopts Du:G:h: o; do case $o in u) uid=$OPTARG ;; G) group=$OPTARG ;; esac; done
shift $((OPTIND - 1))
while cut -d: -f3 /etc/passwd | grep -qx "$uid"; do uid=$((uid + 1)); done
[ -n "$group" ] || { group=$1; echo "$1:x:$uid:" >>/etc/group; }
gid=$(grep "^$group:" /etc/group | cut -d: -f3)
echo "$1:x:$uid:$gid::/home/$1:/bin/sh" >>/etc/passwd
mkdir -p "/home/$1"
chown "$uid:$gid" "/home/$1"
`
	addgroup = `#!/bin/sh
set -e
gid=1000
while getopts g: o; do gid=$OPTARG; done
shift $((OPTIND - 1))
echo "$1:x:$gid:" >>/etc/group
`
)

// FewApplets is [Busybox] with links for these applets only: an image that runs
// and has few files.
func FewApplets(t testing.TB, applets ...string) Image {
	t.Helper()
	img, err := busyboxWith("few-applets", applets, nil)
	return must(t, img, err)
}

func busyboxWith(name string, applets []string, more func(*LayerBuilder)) (Image, error) {
	if err := need(busyboxBinary, "busybox-static"); err != nil {
		return Image{}, err
	}
	binary, err := os.ReadFile(busyboxBinary)
	if err != nil {
		return Image{}, err
	}
	sum := sha256.Sum256(binary)
	return cached(name, append([]string{"1", hex.EncodeToString(sum[:])}, applets...), func(l *Layout) (Image, error) {
		layer, err := l.AddLayer(Gzip, "ADD busybox /", func(b *LayerBuilder) {
			fillBusybox(b, binary, applets, more != nil)
			if more != nil {
				more(b)
			}
		})
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

func fillBusybox(b *LayerBuilder, binary []byte, applets []string, alike bool) {
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
	if alike {
		b.Text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\nbin:x:2:2:bin:/bin:/bin/false\n"+
			"www-data:x:33:33:www-data:/var/www:/bin/false\nnobody:x:65534:65534:nobody:/home:/bin/false\n")
		b.Text("etc/group", "root:x:0:\ndaemon:x:1:\nbin:x:2:\nadm:x:4:\nwheel:x:10:root\nwww-data:x:33:\nstaff:x:50:\nnobody:x:65534:\n")
		return
	}
	b.Text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\nuser:x:1000:1000:user:/home/user:/bin/sh\n")
	b.Text("etc/group", "root:x:0:\nnogroup:x:65534:\nuser:x:1000:\nextra:x:2000:user\n")
	b.File("etc/shadow", 0o640, []byte("root:*:::::::\nuser:*:::::::\n"))
	b.Text("etc/nsswitch.conf", "hosts: files dns\n")
	b.Dir("home/user", 0o755, Owner(1000, 1000))
}
