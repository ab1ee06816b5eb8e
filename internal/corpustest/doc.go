// Package corpustest builds the corpus of Dockerfiles in builder/testdata/corpus
// with BuildKit's own clients, against varve in buildkitd's place, and compares
// what comes out with what buildkitd made of the same.
//
// A case is one txtar file. Its files are the build context, in which the
// clients run, but for these:
//
//	args        flags of `buildx build`, a line each, and the context if it is not "."
//	xattrs      a line each: FILE NAME VALUE
//	setup       a shell script that makes what a text file cannot say
//	want        what comes out: made by buildkitd with
//	            go test -tags seccomp,peers -run TestPeers ./internal/corpustest -update
//	varve       what varve makes of it, where that is another thing on purpose:
//	            the text above the first file says why, but for errors,
//	            which are in varve's words
//
// In the files, BASE is the busybox image that is a registry's, WEB is the URL
// of a web server that has the case's folder, and git repositories in it, and
// KEY is a file with a private key for ssh.
package corpustest
