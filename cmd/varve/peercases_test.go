//go:build peers

package main

import "testing"

// peerCases are builds that varve and BuildKit must give the same results for,
// or both refuse.
func peerCases(t *testing.T) []peerCase {
	tarball := archiveOf(t, "top/", "top/file", "other")
	return []peerCase{
		{name: "config", dockerfile: `FROM BASE
LABEL a=b "c d"="e f"
ENV A=1 B="two words" C=$A
EXPOSE 80 443/tcp 53/udp
VOLUME /data /more
USER 7:8
WORKDIR /made/by/workdir
WORKDIR relative
STOPSIGNAL SIGQUIT
HEALTHCHECK --interval=5s --timeout=3s --start-period=1s --retries=2 CMD echo healthy
SHELL ["/bin/sh", "-ec"]
ENTRYPOINT ["/bin/entry", "a b"]
CMD echo shell form
ONBUILD RUN echo later
`},
		{name: "arguments", dockerfile: `ARG TAG=latest
ARG WHO=nobody
FROM BASE
ARG WHO
ARG GREETING=hello
ARG TARGETPLATFORM
ARG TARGETARCH
RUN echo "$GREETING $WHO $TARGETPLATFORM $TARGETARCH ${UNSET:-unset} $TAG." > /said
ENV SAID=${GREETING}-${WHO:+somebody}
`, args: []string{"--build-arg", "GREETING=goodbye", "--label", "from=outside"}},
		{name: "an argument that is not declared", dockerfile: "FROM BASE\nRUN echo \"$NOT.\" > /f\n", args: []string{"--build-arg", "NOT=x"}},
		{name: "copies", dockerfile: `FROM BASE
COPY a.txt /
COPY a.txt /renamed
COPY a.txt dir /into/
COPY dir /dir
COPY dir/ /dir2/
COPY dir/*.md /md/
COPY --chown=7 a.txt /c7
COPY --chown=7:8 dir /c78
COPY --chmod=640 a.txt /m640
COPY --chmod=u=rwX,go=rX dir /symbolic
COPY --exclude=*.md dir /excluded
COPY --parents dir/sub/deep.txt dir/x.md /parents/
COPY --parents ./dir/./sub/*.txt /pivot/
COPY ["a.txt", "with space", "/list/"]
COPY . /everything/
WORKDIR /w
COPY a.txt here/
COPY a.txt .
`, files: []string{"a.txt", "a", "dir/x.md", "x", "dir/y.md", "y", "dir/z", "z", "dir/sub/deep.txt", "deep", "with space", "s", "run.sh", "#!/bin/sh\n", "dir/l.link", "x.md", "broken.link", "/nowhere"}},
		{name: "copies that link", dockerfile: `FROM BASE AS parts
RUN mkdir -p /out/a && echo 1 > /out/a/1 && chown 5:6 /out/a/1 && ln /out/a/1 /out/a/2
FROM BASE
RUN mkdir -p /here/a && echo old > /here/a/old && echo gone > /here/a/1
COPY --link --from=parts /out/ /here/
COPY --link --chown=7:8 a.txt /srv/deep/
COPY --link a.txt /home
COPY --link --chmod=600 a.txt /private/
ADD --link t.tgz /unpacked/
RUN rm /here/a/old && cat /here/a/1 > /after
`, files: []string{"a.txt", "a", "t.tgz", tarball}},
		{name: "copy over what is there", dockerfile: `FROM BASE
RUN mkdir -p /real/sub /full && ln -s real /alias && ln -s /real/sub /absolute && echo x > /full/x && echo f > /file && ln -s nowhere /dangling
COPY a.txt /alias/
COPY dir /absolute
COPY dir/ /full
COPY a.txt /file
COPY a.txt /alias/sub/b.txt
COPY a.txt /dangling
`, files: []string{"a.txt", "a", "dir/x", "x", "dir/sub/y", "y"}},
		{name: "copy a directory onto a file", refused: true, dockerfile: "FROM BASE\nRUN echo f > /file\nCOPY dir /file\n", files: []string{"dir/x", "x"}},
		{name: "copy a file onto a directory", refused: true, dockerfile: "FROM BASE\nRUN mkdir -p /d/a.txt\nCOPY a.txt /d/\n", files: []string{"a.txt", "a"}},
		{name: "copy links", dockerfile: `FROM BASE
COPY l /followed
COPY d /dir
COPY dirlink /dirlink
COPY dirlink/ /dirlink2/
`, files: []string{"a.txt", "a", "l.link", "a.txt", "d/rel.link", "../a.txt", "d/abs.link", "/etc/passwd", "d/f", "f", "dirlink.link", "d"}},
		{name: "copy what is not there", refused: true, dockerfile: "FROM BASE\nCOPY nothing /\n"},
		{name: "copy a wildcard that matches nothing", dockerfile: "FROM BASE\nCOPY nothing* /\n"},
		{name: "copy out of the context", refused: true, dockerfile: "FROM BASE\nCOPY ../../etc/passwd /stolen\n"},
		{name: "copy by a link out of the context", refused: true, dockerfile: "FROM BASE\nCOPY out /stolen\n", files: []string{"out.link", "/etc/passwd"}},
		{name: "owners by name", dockerfile: `FROM BASE
RUN echo 'me:x:77:78::/:/bin/sh' >> /etc/passwd && echo 'us:x:99:' >> /etc/group
COPY --chown=me a.txt /a
COPY --chown=me:us a.txt /b
COPY --chown=me:5 a.txt /c
USER me
RUN id -u > /tmp/id; id -g >> /tmp/id
COPY a.txt /d
WORKDIR /workdir
`, files: []string{"a.txt", "a"}},
		{name: "an owner that is unknown", stricter: true, dockerfile: "FROM BASE\nCOPY --chown=nobodyhere a.txt /a\n", files: []string{"a.txt", "a"}},
		{name: "archives", dockerfile: `FROM BASE
RUN mkdir /b && echo here > /b/kept
ADD t.tgz /a/
ADD t.tgz /b
ADD --chown=3:4 t.tgz /c/
ADD --unpack=false t.tgz /d/
ADD a.txt /e
COPY t.tgz /f/
ADD notreally.tar /g/
`, files: []string{"t.tgz", tarball, "a.txt", "a", "notreally.tar", "text"}},
		{name: "an archive with a file that would mean a deletion", stricter: true, dockerfile: "FROM BASE\nADD t.tgz /\n",
			files: []string{"t.tgz", archiveOf(t, "etc/.wh.passwd")}},
		{name: "here-documents", dockerfile: `FROM BASE
ARG X=expanded
COPY <<EOF /a
$X
EOF
COPY --chmod=755 <<'EOF' <<other /scripts/
$X
EOF
second
other
RUN <<EOF
echo one > /one
echo "$X" > /two
EOF
RUN <<EOF cat > /three
three
EOF
RUN <<EOF
#!/bin/sh -e
echo "$0" | head -c 5 > /four
EOF
`},
		{name: "stages", dockerfile: `FROM BASE AS one
RUN echo one > /f
FROM one AS two
RUN echo two >> /f
FROM BASE AS never
RUN false
FROM scratch AS files
COPY --from=two /f /f
COPY --from=0 /f /first
FROM BASE
COPY --from=files / /
COPY --from=BASE /etc/passwd /theirs
`},
		{name: "a target", dockerfile: "FROM BASE AS one\nRUN echo 1 > /f\nFROM one AS two\nRUN echo 2 > /f\n", args: []string{"--target", "one"}},
		{name: "a target that is not there", refused: true, dockerfile: "FROM BASE\n", args: []string{"--target", "nowhere"}},
		{name: "nothing but a label", dockerfile: "FROM scratch\nLABEL a=b\n"},
		{name: "a file alone", dockerfile: "FROM scratch\nCOPY a.txt /\n", files: []string{"a.txt", "a"}},
		{name: "mounts", dockerfile: `FROM BASE AS tools
RUN mkdir /t && echo tool > /t/tool
FROM BASE
RUN --mount=type=bind,from=tools,source=/t,target=/mnt cat /mnt/tool > /a
RUN --mount=type=bind,target=/ctx ls /ctx > /b
RUN --mount=type=bind,target=/ctx,rw echo x > /ctx/new && ls /ctx > /c
RUN --mount=type=bind,source=a.txt,target=/one cp /one /d
RUN --mount=type=tmpfs,target=/tmpfs echo x > /tmpfs/x && grep -c " /tmpfs tmpfs" /proc/mounts > /e
RUN --mount=type=cache,target=/cache,uid=7,gid=8,mode=0750 stat -c '%u %g %a' /cache > /f && echo x > /cache/x
RUN --mount=type=cache,target=/cache,uid=7,gid=8,mode=0750 cat /cache/x > /g
RUN --mount=type=cache,from=tools,source=/t,target=/seeded cat /seeded/tool > /h && echo more > /seeded/more
RUN --mount=type=cache,from=tools,source=/t,target=/seeded,sharing=locked ls /seeded > /h2 && stat -c '%u %g %a' /seeded >> /h2
RUN --mount=type=secret,id=none,target=/s test ! -e /s
RUN --network=none ip link 2>/dev/null | grep -c ^[0-9] > /i
`, files: []string{"a.txt", "a", "Dockerfile.dockerignore", "", "sub/b", "b"}},
		{name: "a secret that is wanted", refused: true, dockerfile: "FROM BASE\nRUN --mount=type=secret,id=x,required=true true\n"},
		{name: "changes of all kinds", dockerfile: `FROM BASE
RUN mkdir -p /d/sub /e /m && echo 1 > /d/1 && echo 2 > /d/sub/2 && ln /d/1 /d/hard && mkfifo /d/pipe && chmod 2775 /e && chmod 1777 /m
RUN rm -r /d && mkdir /d && echo new > /d/new
RUN mv /d /moved && mv /e/ /e2
RUN echo more >> /moved/new && chmod 4711 /moved/new && chown 12:34 /moved
RUN rm -r /moved && echo file > /moved
RUN rm /moved && mkdir -p /moved/again && ln -s ../moved /moved/again/up
RUN mknod /null2 c 1 3 && mknod /blk b 7 99 && touch -h -d '2002-02-02 02:02:02' /moved/again/up
RUN chmod 700 /etc/passwd && touch /etc/passwd && chown 0:7 /bin
RUN true
RUN echo a > /x && rm /x
RUN mkdir "/spa ce" && touch "/spa ce/ünï" "/-dash" "$(printf '/new\nline')"
`},
		{name: "what is ignored", dockerfile: "FROM BASE\nCOPY . /all/\nCOPY kept /kept/\n", files: []string{
			".dockerignore", "# a comment\n**/*.o\n!keep.o\nnode_modules\nkept/*\n!kept/this\n/top\n.git*\nDockerfile\n",
			"a.o", "", "keep.o", "", "x/keep.o", "", "x/b.o", "", "node_modules/a", "", "x/node_modules/b", "", "kept/this", "", "kept/that", "", "top", "", "x/top", "", ".gitignore", "", "src/c", ""}},
		{name: "the Dockerfile's own ignore file", dockerfile: "FROM BASE\nCOPY . /all/\n", files: []string{
			".dockerignore", "a\n", "Dockerfile.dockerignore", "b\n", "a", "", "b", ""}},
		{name: "triggers", dockerfile: `FROM BASE AS base
ONBUILD COPY a.txt /triggered
ONBUILD RUN cat /triggered > /ran
FROM base
RUN echo own > /own
`, files: []string{"a.txt", "a"}},
		{name: "shells", dockerfile: `FROM BASE
RUN ["/bin/sh", "-c", "echo $0 exec > /a"]
SHELL ["/bin/sh", "-xc"]
RUN echo shell > /b
RUN echo one && \
    # a comment in the middle
    echo two > /c
`},
		{name: "the environment of a step", dockerfile: `FROM BASE
ENV KEPT=kept
WORKDIR /w
RUN env | grep -v '^OTEL\|^TRACEPARENT' | sort > /env; pwd > /pwd; hostname > /host; id > /id; umask > /umask; cat /etc/hosts | grep -c extra > /hosts
RUN ulimit -n > /nofile; ls /dev | grep -v otel | sort > /dev-list; ls -ld /dev/shm /dev/pts /sys /proc | cut -c1-10 > /perms; grep Cap /proc/self/status > /caps; grep -i seccomp: /proc/self/status > /seccomp; grep NoNew /proc/self/status > /nnp
RUN cat /proc/mounts | cut -d' ' -f2,3 | grep -v 'cgroup\|otel' | sort > /mounts
`, args: []string{"--add-host", "extra:10.1.2.3"}},
		{name: "a volume is written to", dockerfile: "FROM BASE\nRUN mkdir /v && echo 1 > /v/1\nVOLUME /v\nRUN echo 2 > /v/2\n"},
		{name: "a step that fails", refused: true, dockerfile: "FROM BASE\nRUN exit 9\n"},
		{name: "a mistake", refused: true, dockerfile: "FROM BASE\nRUNN true\n"},
		{name: "an argument in a base's name that is not set", refused: true, dockerfile: "FROM ${NOTHING}\n"},
		{name: "the hard way round links", dockerfile: `FROM BASE
RUN mkdir /a && ln -s / /a/root && ln -s /a /b
COPY a.txt /b/root/etc/through
WORKDIR /b/root/made
COPY a.txt x
RUN pwd > /pwd
`, files: []string{"a.txt", "a"}},
	}
}
