{{- /* A job that Helm waits for; argument: root, name, events, script, seconds, and ray: whether it talks to Ray,
       and not to the service. */}}
{{- define "shoal.hook" -}}
apiVersion: batch/v1
kind: Job
metadata:
  name: {{ include "shoal.name" .root }}-{{ .name }}
  labels: {{- include "shoal.labels" (dict "root" .root "component" "hook") | nindent 4 }}
  annotations:
    helm.sh/hook: {{ .events }}
    helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
spec:
  backoffLimit: 2
  activeDeadlineSeconds: {{ int .seconds }}
  template:
    metadata:
      labels: {{- include "shoal.podLabels" (dict "root" .root "component" "hook") | nindent 8 }}
    spec:
      {{- include "shoal.podCommon" (dict "root" .root) | nindent 6 }}
      restartPolicy: Never
      containers:
        - name: {{ .name }}
          {{- include "shoal.image" .root | nindent 10 }}
          command: ["/bin/bash", "-euc"]
          args:
            - | {{- .script | nindent 14 }}
          securityContext: {{- include "shoal.containerSecurity" .root | nindent 12 }}
          resources:
            requests: {cpu: 100m, memory: 512Mi}
            limits: {cpu: "1", memory: 1Gi}
          env:
            {{- include "shoal.env" (dict "root" .root "admin" (not .ray)) | nindent 12 }}
            {{- if .ray }}
            - name: RAY_DASHBOARD_ADDRESS
              value: http://{{ include "shoal.name" .root }}-head-svc.{{ .root.Release.Namespace }}:8265
            {{- include "shoal.rayTokenEnv" .root | nindent 12 }}
            {{- end }}
          volumeMounts:
            {{- include "shoal.scratchMounts" .root | nindent 12 }}
            {{- if .ray }}
            - name: serve
              mountPath: /etc/shoal/serve
              readOnly: true
            {{- end }}
      volumes:
        {{- include "shoal.scratchVolumes" .root | nindent 8 }}
        {{- if .ray }}
        - name: serve
          configMap:
            name: {{ include "shoal.name" .root }}-serve
        {{- end }}
{{- end -}}
