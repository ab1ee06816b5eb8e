#include <stdio.h>
#include <sys/utsname.h>
#include <unistd.h>

int main(void)
{
	struct utsname u;

	uname(&u);
	printf("built and run by varve: uid %d on Linux %s\n", (int)getuid(), u.release);
	return 0;
}
