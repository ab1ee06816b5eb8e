package corpustest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/moby/buildkit/client"
)

// output takes what is said of the output out of a case's arguments: an OCI
// archive if nothing is.
func (c *testCase) output(dest string) (output string, rest []string) {
	output = "type=oci"
	for _, a := range c.args {
		if o, ok := strings.CutPrefix(a, "--output "); ok {
			output = o
		} else {
			rest = append(rest, a)
		}
	}
	return output + ",dest=" + dest, rest
}

// buildctl builds a case by the client that passes on what it is told. The
// arguments are buildx's, and are said in the frontend's words.
func buildctl(bin, addr string) clientCommand {
	return func(c *testCase, dest string) *exec.Cmd {
		output, flags := c.output(dest)
		args := []string{"--addr", addr, "build", "--progress=rawjson", "--frontend=dockerfile.v0"}
		folder := "."
		for _, a := range flags {
			flag, value, _ := strings.Cut(a, " ")
			key, rest, _ := strings.Cut(value, "=")
			switch flag {
			case "--build-arg", "--label":
				args = append(args, "--opt", strings.TrimPrefix(flag, "--")+":"+value)
			case "--target", "--platform", "--ulimit":
				args = append(args, "--opt", strings.TrimPrefix(flag, "--")+"="+value)
			case "--add-host":
				name, ip, _ := strings.Cut(value, ":")
				args = append(args, "--opt", "add-hosts="+name+"="+ip)
			case "--network":
				args = append(args, "--opt", "force-network-mode="+value)
			case "--no-cache-filter":
				args = append(args, "--opt", "no-cache="+value)
			case "--shm-size":
				args = append(args, "--opt", "shm-size="+value)
			case "--file":
				folder = filepath.Dir(value)
				args = append(args, "--opt", "filename="+filepath.Base(value))
			case "--build-context":
				if _, err := os.Stat(filepath.Join(c.dir, rest)); err == nil {
					args = append(args, "--local", value)
					rest = "local:" + key
				}
				args = append(args, "--opt", "context:"+key+"="+rest)
			case "--annotation":
				output += ",annotation" + annotationKey(value)
			default: // the same in both
				args = append(args, strings.Fields(a)...)
			}
		}
		if c.context == "." {
			args = append(args, "--local", "context=.", "--local", "dockerfile="+folder)
		} else {
			args = append(args, "--opt", "context="+c.context)
		}
		return exec.Command(filepath.Join(bin, "buildctl"), append(args, "--output", output)...)
	}
}

// annotationKey says "index:KEY=VALUE" as the exporter's options do.
func annotationKey(value string) string {
	what, rest, ok := strings.Cut(value, ":")
	if key, _, _ := strings.Cut(value, "="); !ok || strings.Contains(key, "/") || len(what) >= len(key) {
		return "." + value
	}
	return "-" + what + "." + rest
}

// clientCommand is the command that builds a case into dest.
type clientCommand func(c *testCase, dest string) *exec.Cmd

// likeBuildx builds a case by buildx, or by a command with its flags.
func likeBuildx(command func(args ...string) *exec.Cmd) clientCommand {
	return func(c *testCase, dest string) *exec.Cmd {
		output, flags := c.output(dest)
		args := []string{"build", "--progress=rawjson", "--provenance=false", "--output", output}
		for _, f := range flags {
			flag, value, ok := strings.Cut(f, " ")
			if args = append(args, flag); ok {
				args = append(args, value)
			}
		}
		return command(append(args, c.context)...)
	}
}

// built is all that came of a case.
func (c *testCase) built(t *testing.T, with clientCommand) string {
	t.Helper()
	dest := dest(t)
	cmd := with(c, dest)
	cmd.Dir = c.dir
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, "CORPUS_SECRET=of the environment")
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	text, warnings := progress(stderr.Bytes())
	if err != nil {
		return c.empty(warnings + refusal(text))
	}
	out, err := c.world.result(dest)
	if err != nil {
		t.Errorf("what was built cannot be read: %v", err)
	}
	return c.empty(warnings + out)
}

// progress parts the text for people from the messages of rawjson, and returns
// the warnings in those.
func progress(all []byte) (text, warnings string) {
	var found []string
	for line := range bytes.Lines(all) {
		var s client.SolveStatus
		if json.Unmarshal(line, &s) != nil {
			text += string(line)
		}
		for _, w := range s.Warnings {
			at := ""
			for _, r := range w.Range {
				at += fmt.Sprintf(" %d", r.Start.Line)
			}
			found = append(found, fmt.Sprintf("warning:%s: %s\n", at, w.Short))
		}
	}
	slices.Sort(found)
	return text, strings.Join(slices.Compact(found), "")
}

var (
	reference = regexp.MustCompile(`\b([a-z0-9]{25}::[a-z0-9]{25}|build:[0-9a-f]{24})\b`)
	mounted   = regexp.MustCompile(`/[^ ]*/cachemounts/buildkit\d+`)
	layerID   = regexp.MustCompile(`\blayer [0-9a-f]{24}\b`)
	marked    = regexp.MustCompile(`(?m)^ *\d+ \| >>>.*\n`)
)

// refusal is the error of a build and the lines that it shows for it.
func refusal(text string) string {
	_, message, ok := strings.Cut(text, "failed to solve: ")
	if !ok {
		message = text
	}
	message, _, _ = strings.Cut(message, "\n\nView build details")
	message = reference.ReplaceAllString(message, "REF")
	message = mounted.ReplaceAllString(message, "MOUNT")
	message = layerID.ReplaceAllString(message, "layer ID")
	return "refused: " + strings.TrimSpace(message) + "\n" + strings.Join(marked.FindAllString(text, -1), "")
}
