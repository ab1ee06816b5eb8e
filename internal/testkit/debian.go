package testkit

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Debian is a real minimal Debian of this host's release, in which apt works:
// one gzip layer made by mmdebstrap. The first call on a machine needs the
// network and takes about a minute; later ones are served from the cache.
func Debian(t testing.TB) Image {
	t.Helper()
	img, err := MakeDebian()
	return must(t, img, err)
}

// MakeDebian is [Debian] outside tests.
func MakeDebian() (Image, error) {
	suite := debianSuite()
	// What the archive holds changes with point releases. The cache keeps the
	// first one made here: tests compare an image with itself, never with a
	// digest written down.
	return cached("debian", []string{"1", suite, runtime.GOARCH}, func(l *Layout) (Image, error) {
		if err := need("mmdebstrap", "mmdebstrap"); err != nil {
			return Image{}, err
		}
		var layer Layer
		err := bootstrap(suite, func(stream io.Reader) (err error) {
			layer, err = l.AddTar(Gzip, "mmdebstrap "+suite, stream)
			return err
		})
		if err != nil {
			return Image{}, err
		}
		manifest, err := l.AddImage(ocispec.ImageConfig{
			Env: []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
			Cmd: []string{"bash"},
		}, layer)
		if err != nil {
			return Image{}, err
		}
		return l.Finish("debian:"+suite, manifest)
	})
}

// bootstrap runs mmdebstrap and hands its tar stream to take.
func bootstrap(suite string, take func(io.Reader) error) error {
	cmd := exec.Command("mmdebstrap", "--quiet", "--variant=minbase", "--format=tar",
		// Containers have no use for these, and they are a third of the files.
		"--dpkgopt=path-exclude=/usr/share/man/*",
		"--dpkgopt=path-exclude=/usr/share/locale/*",
		"--dpkgopt=path-exclude=/usr/share/doc/*",
		"--dpkgopt=path-include=/usr/share/doc/*/copyright",
		suite, "-")
	cmd.Env = append(os.Environ(), "SOURCE_DATE_EPOCH="+strconv.FormatInt(Epoch.Unix(), 10))
	var complaints bytes.Buffer
	cmd.Stderr = &complaints
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	took := take(out)
	// Drained, so that mmdebstrap ends by itself and cleans up its mounts.
	_, _ = io.Copy(io.Discard, out)
	if err := cmd.Wait(); err != nil {
		return fmt.Errorf("mmdebstrap %s: %w\n%s", suite, err, complaints.Bytes())
	}
	return took
}

// debianSuite is the code name of this host's Debian, or of the one that the
// project is developed on where the host is something else.
func debianSuite() string {
	const fallback = "bookworm"
	data, err := os.ReadFile("/etc/os-release")
	if err != nil {
		return fallback
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(data)) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			fields[key] = strings.Trim(value, `"`)
		}
	}
	if fields["ID"] == "debian" && fields["VERSION_CODENAME"] != "" {
		return fields["VERSION_CODENAME"]
	}
	return fallback
}
